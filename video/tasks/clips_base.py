"""The base model of the clips task: a tiny Qwen2.5-VL that finds and reads strong events and often misses weak ones.

Made once from random weights by a fixed recipe (no download) and kept in the user's cache folder, in the layout of any
transformers model. Two stages: *align* (every token of a look names what it shows) and imitation of correct episodes,
with doubt. No film is encoded: clips are drawn small, with noise in place of what encoding does to them.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmrl.cache import cache_root, made_once
from mmrl.seeding import numpy_generator
from video.tasks.clips_model import (
    WORDS,
    Episode,
    hidden_states,
    look_features,
    new_model,
    new_processor,
    text_positions,
)
from video.tasks.clips_scene import (
    ANSWER,
    COLOURS,
    FRAME,
    GRID,
    PER_SEGMENT,
    QUESTIONS,
    SEGMENT,
    SEGMENTS,
    ZOOM,
    Clip,
    Pixels,
    cell_name,
    sample_clip,
    second_of,
    solve,
)
from vision import load_model, load_processor, save_model
from vision.tiny_models import END, PAD, SPECIAL, cosine, optimizer_of, pad_examples, progress, set_lr, update

log = logging.getLogger(__name__)

# levels of a shown pixel: about what encoding changes, see tests/video/test_clips.py
NOISE = 1.5
# tokens, the end mark included
LONGEST_TURN = 9

_ID = WORDS.ids
# tokens that no turn holds: placeholders and marks of the template
_NEVER_WRITTEN = [_ID[word] for word in SPECIAL if word != END]


@dataclass(frozen=True)
class Recipe:
    """Measured on one core: about 92 CPU-seconds; on films of contrast 0.15 to 0.3, greedy, it then finds .55 of the
    segments and .42 of the frames, and answers .41 of the questions (192 of them)."""

    pool: int = 2000  # clips, each with one question
    contrast: tuple[float, float] = (0.5, 1.0)
    align_steps: int = 150
    align_batch: int = 64
    steps: int = 300  # of imitation
    batch: int = 32
    doubt: tuple[float, float, float, float] = (0.2, 0.3, 0.12, 0.1)  # segment, frame, corner of a box, answer
    width: int = 128
    layers: int = 3
    lr: float = 3e-3
    seed: int = 0
    version: int = 1  # raise when the code below, the clips or the network change what it makes

    @property
    def key(self) -> str:
        """Folder name in the cache: a hash of everything that decides the weights."""
        # the vocabulary too, which grows with the codes of problems
        settings = asdict(self) | {"words": WORDS.words}
        return "clips-" + hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def clips_base(recipe: Recipe | None = None) -> Path:
    """The folder of model and processor, made first if it is not there. One process makes it, the others wait.

    Raises:
        RuntimeError: the cached files are damaged.
    """
    recipe = recipe or Recipe()
    folder = made_once(cache_root() / recipe.key, partial(_make, recipe))
    try:
        load_model(folder), load_processor(folder)
    except Exception as error:
        raise RuntimeError(
            f"the cached clips model in {folder} is damaged ({error}); delete that folder and run again, "
            "it is made anew in about 2 minutes"
        ) from error
    return folder


def _make(recipe: Recipe, work: Path) -> None:
    log.info("pre-training the clips model (about 2 minutes on one core, once); cache: %s", work.parent)
    model = train_base(recipe)
    right = accuracy(model, contrast=recipe.contrast, number=64)
    level = logging.INFO if right >= 0.9 else logging.WARNING
    log.log(level, "the clips model answers %.0f%% of 64 held-out questions right (usually all of them)", 100 * right)
    save_model(model, new_processor(), work)
    (work / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1) + "\n")


def train_base(recipe: Recipe) -> Any:
    """The trained model, the same for the same recipe on the same hardware and number of threads."""
    rng = numpy_generator("clips-base", recipe.seed)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        model = new_model(recipe.width, recipe.layers)
    pool = [_sample_solved(rng, recipe) for _ in progress(range(recipe.pool), "drawing clips")]
    align(model, pool, recipe, rng)
    imitate(model, pool, recipe, rng)
    return model.eval()


def _sample_solved(rng: np.random.Generator, recipe: Recipe) -> Episode:
    question = QUESTIONS[int(rng.choice(3, p=(0.25, 0.25, 0.5)))]
    return solved(sample_clip(rng, "sft", contrast=recipe.contrast), question)


def solved(clip: Clip, question: str) -> Episode:
    """The correct episode."""
    episode = Episode(clip, question)
    for turn in solve(clip, question):
        episode.say(turn)
    return episode


def align(model: Any, pool: Sequence[Episode], recipe: Recipe, rng: np.random.Generator) -> None:
    """Train the tower and the embeddings until each token of a look, read through the output matrix, names what it
    shows: two words at probability 1/2 each."""
    embedding = model.get_input_embeddings().weight
    optimizer = optimizer_of([*model.model.visual.parameters(), embedding], recipe.lr)
    for step in progress(range(recipe.align_steps), "aligning pictures and words (clips)"):
        set_lr(optimizer, recipe.lr * cosine(step / recipe.align_steps))
        batch = [pool[i] for i in rng.integers(len(pool), size=recipe.align_batch)]
        names = []
        for episode in batch:
            names += [[_ID[first], _ID[second]] for first, second in names_of(episode)]
        # (tokens of all looks, words): cross-entropy with half the probability on either name
        logits = look_features(model, noisy(batch, rng)) @ embedding.T
        update(model, optimizer, -logits.log_softmax(-1).gather(-1, torch.tensor(names)).mean())


def names_of(episode: Episode) -> list[tuple[str, str]]:
    """Two words for each token of a correct episode's looks: which segment, and its lamp; which pair of frames, and
    which of them has the box; the box's cell; its colour."""
    clip = episode.clip
    # the overview: one token per segment
    names = [(str(s + 1), "lit" if s == clip.segment else "dark") for s in range(SEGMENTS)]
    # the segment: one token per pair of frames
    num_pairs = PER_SEGMENT // 2
    pair_of_box, place_in_pair = divmod(clip.frame, 2)
    for pair in range(num_pairs * clip.segment, num_pairs * (clip.segment + 1)):
        content = ("first", "second")[place_in_pair] if pair == pair_of_box else "empty"
        names.append((str(2 * pair + 1), content))
    # the frame: one token per quarter
    row, column = divmod(clip.cell, GRID)
    quadrant_of_box = 2 * (row // 2) + column // 2
    for quadrant in range(4):
        content = cell_name(clip.cell) if quadrant == quadrant_of_box else "empty"
        names.append((content, content))
    # the crop, which only a colour needs: one token
    if episode.question == "colour":
        colour = list(COLOURS)[clip.colour]
        names.append((colour, colour))
    return names


def noisy(batch: Sequence[Episode], rng: np.random.Generator) -> list[Pixels]:
    """The looks of some episodes with fresh noise, the same on both copies of a still."""
    looks = []
    for episode in batch:
        for view, look in zip(episode.views, episode.looks, strict=True):
            noise = rng.standard_normal(look.shape, dtype=np.float32)
            if view.times == 1:
                noise[1] = noise[0]
            looks.append(np.rint(look + NOISE * noise).clip(0, 255).astype(np.uint8))
    return looks


def imitate(model: Any, pool: Sequence[Episode], recipe: Recipe, rng: np.random.Generator) -> None:
    """Cross-entropy of the turns of correct episodes, in doubt about what they name."""
    optimizer = optimizer_of(model.parameters(), recipe.lr)
    targets = [targets_of(episode, recipe.doubt) for episode in pool]
    for step in progress(range(recipe.steps), "learning to look and to answer (clips)"):
        set_lr(optimizer, recipe.lr * min(1.0, (step + 1) / 50) * cosine(step / recipe.steps))
        indices = rng.integers(len(pool), size=recipe.batch)
        batch = [pool[i] for i in indices]
        logits = written_logits(model, batch, noisy(batch, rng))
        update(model, optimizer, F.cross_entropy(logits, torch.cat([targets[i] for i in indices])))


def targets_of(episode: Episode, doubt: Sequence[float]) -> Tensor:
    """(written tokens, words) probabilities of the words of an episode's turns.

    1 for the right word, but the name in a turn (a segment, a frame, a corner, the answer) shares `doubt` with all
    words that could stand in its place.
    """
    frames = range(PER_SEGMENT * episode.clip.segment, PER_SEGMENT * (episode.clip.segment + 1))
    answers = {"when": map(second_of, frames), "where": map(cell_name, range(GRID**2)), "colour": COLOURS}
    # kind of turn -> the places of its name, and the words that could stand there
    alternatives = {
        SEGMENT: ((2,), [str(s + 1) for s in range(SEGMENTS)]),
        FRAME: ((2,), [str(f + 1) for f in frames]),
        ZOOM: ((3, 4), [f"{1000 * k // GRID}," for k in range(GRID)]),
        ANSWER: ((1,), list(answers[episode.question])),
    }
    doubt_of = dict(zip(alternatives, doubt, strict=True))
    targets = []
    for turn in episode.turns:
        # (tokens of the turn and its end mark, words)
        probabilities = F.one_hot(torch.tensor([*WORDS.encode(turn), _ID[END]]), len(_ID)).float()
        kind = turn.split(" ")[0]
        places, words = alternatives[kind]
        for place in places:
            probabilities[place] *= 1 - doubt_of[kind]
            probabilities[place, [_ID[word] for word in words]] += doubt_of[kind] / len(words)
        targets.append(probabilities)
    return torch.cat(targets)


def written_logits(model: Any, batch: Sequence[Episode], looks: Sequence[Pixels]) -> Tensor:
    """(S, words) logits of the S tokens that the model wrote in some episodes, row by row."""
    ids, is_written = pad_examples([(episode.ids, episode.is_written) for episode in batch], _ID[PAD])
    positions = _stack_positions([episode.positions for episode in batch], ids.shape[1])
    # (B, T, width); a token is predicted at the place before it
    hidden = hidden_states(model, ids, positions, look_features(model, looks))
    return hidden[:, :-1][is_written[:, 1:]] @ model.get_input_embeddings().weight.T


@torch.no_grad()
def play(
    model: Any, clips: Sequence[Clip], questions: Sequence[str], *, temperature: float = 0.0, seed: int = 0
) -> list[Episode]:
    """Episodes with the model's own turns: the most likely, or sampled at a temperature."""
    episodes = [Episode(clip, question) for clip, question in zip(clips, questions, strict=True)]
    random = torch.Generator().manual_seed(seed)
    live = episodes
    while live:
        for episode, turn in zip(live, _next_turns(model, live, temperature, random), strict=True):
            episode.say(turn)
        live = [episode for episode in live if not episode.done]
    return episodes


def _next_turns(model: Any, live: Sequence[Episode], temperature: float, random: torch.Generator) -> list[str]:
    """One more turn of each episode: `LONGEST_TURN` tokens, cut at the end mark; each costs a whole forward."""
    looks: list[Pixels] = []
    for episode in live:
        looks += episode.looks
    features = look_features(model, looks)
    rows = [list(episode.ids) for episode in live]
    for num_written in range(LONGEST_TURN):
        ids, _ = pad_examples([(row, []) for row in rows], _ID[PAD])
        positions = []
        for episode in live:
            written_positions = text_positions(num_written, episode.next)
            positions.append(torch.cat([episode.positions, written_positions], dim=1))
        hidden = hidden_states(model, ids, _stack_positions(positions, ids.shape[1]), features)
        # (B, width): rows are padded on the right
        last_tokens = torch.tensor([len(row) - 1 for row in rows])
        last_hidden = hidden[torch.arange(len(rows)), last_tokens]
        logits = last_hidden @ model.get_input_embeddings().weight.T
        logits[:, _NEVER_WRITTEN] = -torch.inf
        tokens = logits.argmax(-1)
        if temperature:
            tokens = torch.multinomial((logits / temperature).softmax(-1), 1, generator=random).flatten()
        for row, token in zip(rows, tokens.tolist(), strict=True):
            row.append(token)
    return [WORDS.decode(row[len(episode.ids) :]) for row, episode in zip(rows, live, strict=True)]


def _stack_positions(rows: Sequence[Tensor], length: int) -> Tensor:
    """(3, B, length), 0 on padding."""
    return torch.stack([F.pad(row, (0, length - row.shape[1])) for row in rows], dim=1)


def accuracy(model: Any, *, contrast: tuple[float, float], number: int = 256) -> float:
    """Share of right answers, greedy, on `number` held-out clips."""
    rng = numpy_generator("clips-accuracy", contrast)
    clips = [sample_clip(rng, "held_out", contrast=contrast) for _ in range(number)]
    questions = [QUESTIONS[i % len(QUESTIONS)] for i in range(number)]
    num_right = 0
    for episode in play(model, clips, questions):
        num_right += episode.turns[-1] == solve(episode.clip, episode.question)[-1]
    return num_right / number
