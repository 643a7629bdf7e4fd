"""Vision-language policies, rewards and reward models."""
