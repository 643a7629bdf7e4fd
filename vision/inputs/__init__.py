"""From a prompt to what a model takes: pictures, chat templates, token ids, loading."""
