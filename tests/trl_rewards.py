"""Rewards as a user of TRL wrote them; nothing of mmrl is known here."""


def correct(completions, answer, **kwargs):
    """1 where the answer occurs in the text."""
    return [float(a in completion[0]["content"]) for completion, a in zip(completions, answer, strict=True)]


def short(prompts, completions, limit: int = 10):
    """1 for texts of at most `limit` characters; None for empty ones."""
    texts = [completion[0]["content"] for completion in completions]
    assert all(prompt[0]["role"] == "user" and prompt[0]["content"] for prompt in prompts)
    return [None if not text else float(len(text) <= limit) for text in texts]


async def slow(completions, **kwargs):
    return [float(len(completion[0]["content"])) for completion in completions]


def looks(completions, images, **kwargs):
    return [float(len(pictures)) for pictures in images]


def needs_solution(completions, solution):
    return [1.0 for _ in completions]
