"""The agent's environment: a clip that answers a manipulation with frames, and a faulty one with its fault.

state = environment.start(prompt)
result = environment.step(state, "FIND_FRAME(dog) = 57", used=900)
result.observation    # tokens of frame 57 and a sentence
result = environment.step(result.state, "FIND_FRAME(dog) = 9999", used=1100)
result.observation    # tokens of "Error out_of_range: frame 9999 is not in the video. Valid: frame 1 to 132."
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any, Literal

from PIL import Image

from mmrl.rollout import Prompt
from video.acting.actions import Look, Problem, UnshowableError, VideoState, act, parse_turn, problem_text
from video.encoding import VideoEncoder, picture
from video.reading.reader import VideoDecodeError, VideoInfo
from vision import PromptTokens, TurnResult

log = logging.getLogger(__name__)

Syntax = Literal["videocom", "tool_call"]

# the sentence beside the frames (worded after Video-CoM's, section 2.1 of its release)
HINTS = {
    "segment": "Here is the selected segment. Go on with the question.",
    "frame": "Here is the selected frame. Go on with the question.",
    "crop": "Here is the selected region. Go on with the question.",
    "text": "Go on with the question.",
}
LAST = "No look is left: answer now."
NOTHING = "No manipulation and no answer was found in this turn."


@dataclass(frozen=True)
class Episode:
    """A conversation about one clip; a prompt without a clip has neither `info` nor `state`.

    closing: the next turn is the last, its looks are not shown any more.
    """

    info: VideoInfo | None
    state: VideoState | None
    closing: bool = False


class VideoEnvironment:
    """Observations of manipulations; see `vision.Environment`.

    Args:
        encoder: makes tokens of looks.
        syntax: how turns are read. coords: the unit of boxes in them.
        turns: most turns of a conversation; the last can only answer.
        max_context: most tokens of a conversation. An observation that would leave no room for `reserve` more is not
            shown: the agent is told to answer.
        hints: write a sentence beside the frames; without, errors are told by their code alone.
    """

    def __init__(
        self,
        encoder: VideoEncoder,
        *,
        syntax: Syntax,
        coords: Literal["norm1000", "unit", "pixels"],
        turns: int,
        max_context: int,
        reserve: int,
        hints: bool,
    ) -> None:
        self.encoder, self.syntax, self.coords, self.turns = encoder, syntax, coords, turns
        self.max_context, self.reserve, self.hints = max_context, reserve, hints

    @property
    def turn_options(self) -> dict[str, Any]:
        """The options of turns that rewards have to share, by their names in `video.rewards.calls.Reading`."""
        return {
            "syntax": self.syntax,
            "coords": self.coords,
            "frame_pixels": self.encoder.views.frame_pixels,
            "factor": self.encoder.factor,
        }

    def start(self, prompt: Prompt) -> Episode:
        """The conversation before its first turn; a prompt without a clip has no looks to ask for."""
        if not prompt.inputs.get("videos"):
            return Episode(None, None)
        info = self.encoder.info(prompt)
        # boxes in pixels are those of a single frame as the model sees it
        seen = self.encoder.still_size(info.height, info.width, self.encoder.views.frame_pixels)
        size = (info.height, info.width)
        state = VideoState.start(info.starts, info.duration, size, coords=self.coords, seen=seen, turns=self.turns)
        return Episode(info, state)

    def step(self, state: Episode, text: str, used: int) -> TurnResult:
        """The answer to a turn: its frames, its fault, or nothing: after an answer, and where nothing more fits.

        Args:
            used: tokens of the conversation up to and with this turn.
        """
        turn = parse_turn(text, self.syntax)
        if turn.answer is not None or state.closing or state.info is None or state.state is None:
            return TurnResult(state, None, ok=turn.answer is not None)
        # pure: nothing is decoded before it is known that the turn may be shown
        after, looks, problem = act(state.state, turn)
        episode = replace(state, state=after, closing=after.turns_left <= 1)
        observation, carried_out = self._observation(state.info, looks, problem, episode.closing)
        if not carried_out:
            # a refused turn changes the turn count alone, so that its calls may be made again
            episode = replace(episode, state=replace(state.state, turns_left=after.turns_left))
        if self._fits(observation, used):
            return TurnResult(episode, observation, carried_out)
        # too long: in its place a line that asks for the answer, and the end where not even that fits
        episode = replace(episode, closing=True)
        observation = self.encoder.observe(state.info, (), self._fault(Problem("budget_exceeded", LAST)))
        if self._fits(observation, used):
            return TurnResult(episode, observation, ok=False)
        return TurnResult(episode, None, ok=False)

    def _fits(self, observation: PromptTokens, used: int) -> bool:
        """True where the observation leaves room for a turn of the policy."""
        return used + len(observation.ids) + self.reserve <= self.max_context

    def picture(self, state: Episode, text: str) -> Image.Image | None:
        """The frames a turn asks for: a segment's side by side, a frame, or a frame with the box of a crop."""
        turn = parse_turn(text, self.syntax)
        if state.info is None or state.state is None or state.closing or turn.answer is not None:
            return None
        _, looks, problem = act(state.state, turn)
        media = [look for look in looks if look.kind != "text"]
        if problem is not None or not media:
            return None
        return picture(self.encoder.reader, state.info, media)

    def _observation(
        self, info: VideoInfo, looks: tuple[Look, ...], problem: Problem | None, closing: bool
    ) -> tuple[PromptTokens, bool]:
        """The tokens of a turn's looks or of its fault, and True where the turn was carried out."""
        carried_out = problem is None
        if problem is None and looks:
            try:
                return self.encoder.observe(info, looks, self._hint(looks[0].kind, closing)), True
            except VideoDecodeError as error:
                # not the policy's fault, so the turn counts as carried out
                message = f"the file is damaged here ({error.reason}); look elsewhere, or answer."
                problem = Problem("unreadable_frames", message)
            except UnshowableError as error:
                log.warning("%s: a turn is refused: %s", info.path, error)
                problem = Problem("failed_action", "this cannot be shown; make another call, or answer.")
                carried_out = False
        fault = self._fault(problem or Problem("parse_error", NOTHING))
        return self.encoder.observe(info, (), fault), carried_out

    def _hint(self, kind: str, closing: bool) -> str:
        """The sentence beside the frames, none without `hints`."""
        if not self.hints:
            return ""
        return f"{HINTS[kind]} {LAST}" if closing else HINTS[kind]

    def _fault(self, problem: Problem) -> str:
        """The text of a refused turn: a sentence, or its code alone without `hints`."""
        return problem_text(problem) if self.hints else problem.code
