"""The cost of a search for one prompt, and its limit."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace


@dataclass
class Budget:
    """The cost of searching for one prompt so far, and its limit. Everything is counted, discarded candidates too.

    "Cached" means with a perfect prefix cache: each token that was computed once is free from then on. Without it,
    every continuation reads its whole prefix again and every score reads its whole path again.

    max_tokens: generated tokens (>= 1) after which no proposal is started, None = no limit. The last proposal may
        pass it, so a search exceeds it by less than one proposal batch.
    policy_params, prm_params: parameters in use per token, for `flops`; 0 = unknown.
    """

    max_tokens: int | None = None
    policy_params: int = 0
    prm_params: int = 0
    generated_tokens: int = 0
    # Prompt and prefix tokens that the policy read.
    prompt_tokens: int = 0
    prompt_tokens_cached: int = 0
    # Tokens that the scorer read.
    prm_tokens: int = 0
    prm_tokens_cached: int = 0
    # Paths scored.
    prm_calls: int = 0
    # Continuations sampled, and those of them that were cut at the policy's length limit.
    model_calls: int = 0
    truncated: int = 0
    # Image features are kept, so each image counts once per model.
    image_encodings: int = 0
    # Wall time; that of a batch of several prompts is divided among them by rows.
    policy_s: float = 0.0
    prm_s: float = 0.0

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(
                f"max_tokens={self.max_tokens}: a search needs at least 1 token; leave it out for no limit"
            )

    @property
    def spent(self) -> bool:
        """True when no further proposal may start."""
        return self.max_tokens is not None and self.generated_tokens >= self.max_tokens

    def fresh(self) -> Budget:
        """A budget with the same limit and all counts 0."""
        return Budget(self.max_tokens, self.policy_params, self.prm_params)

    def snapshot(self) -> Budget:
        """A copy that no longer changes."""
        return replace(self)

    def report(self) -> dict[str, float | None]:
        """The counts with `wall_s` and the forward FLOPs 2 * params * tokens, None where parameters are unknown."""
        report: dict[str, float | None] = asdict(self)
        for setting in ("max_tokens", "policy_params", "prm_params"):
            del report[setting]
        report["wall_s"] = self.policy_s + self.prm_s
        report["flops"] = report["flops_cached"] = None
        if self.policy_params and self.prm_params:
            report["flops"] = self._flops(self.prompt_tokens, self.prm_tokens)
            report["flops_cached"] = self._flops(self.prompt_tokens_cached, self.prm_tokens_cached)
        return report

    def _flops(self, prompt: int, prm: int) -> float:
        """Forward FLOPs; prompt, prm: tokens read by the policy and by the scorer."""
        return 2.0 * (self.policy_params * (self.generated_tokens + prompt) + self.prm_params * prm)
