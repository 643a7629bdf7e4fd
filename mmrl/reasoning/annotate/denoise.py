"""Labels that allow for noise: SCAN's window before a found error, FreePRM's pseudo-labels."""

from __future__ import annotations

from typing import Literal

from mmrl.reasoning.annotate.labels import Labels, labels_up_to
from mmrl.reasoning.annotate.targets import Values, soft


def scan_use(final_correct: bool, consistency: float, eps: float = 0.5) -> Literal["positive", "estimate", "drop"]:
    """The use of a response by SCAN: take it as all right, estimate its steps, or leave it out.

    consistency: share in [0, 1] of right answers among the annotator's own samples. Only above `eps` does it know the
    question well enough; the one threshold for both uses is as defined here.
    """
    if consistency <= eps:
        return "drop"
    return "positive" if final_correct else "estimate"


def scan_labels(values: Values, first_error: int, consistency: float, *, window: int = 2) -> Labels:
    """SCAN: 1, then min(m_t / consistency, 1) in the `window` steps before the first error, 0 at it, None after it.

    Dividing by the annotator's own consistency in (0, 1] takes its ability out of the estimate. An unsampled step
    of the window stays None. first_error -1 gives all 1.

    Raises:
        ValueError: consistency outside (0, 1], a negative window, or a first error outside -1..T-1.
    """
    if not 0 < consistency <= 1 or window < 0:
        raise ValueError(f"scan: consistency {consistency} must be in (0, 1] and window {window} >= 0")
    labels = list(labels_up_to(first_error, len(values)))
    for t in range(max(first_error - window, 0), max(first_error, 0)):
        # `soft` also checks that it is a value.
        (m,) = soft(values[t : t + 1])
        labels[t] = None if m is None else min(m / consistency, 1.0)
    return tuple(labels)


def pseudo_labels(outcome: float, num_steps: int) -> Labels:
    """FreePRM: every step gets the outcome of the whole, in [0, 1].

    Raises:
        ValueError: no steps, or an outcome outside [0, 1].
    """
    if num_steps < 1 or not 0 <= outcome <= 1:
        raise ValueError(f"outcome {outcome} must be in [0, 1] and num_steps {num_steps} >= 1")
    return (float(outcome),) * num_steps
