"""An environment that answers with stills, a film or words, for models of the Qwen-VL families; and none for text."""

import numpy as np
import torch

from mmrl.rollout import Prompt
from video.reading.patches import Norm, patchify
from vision.growth.environment import TurnResult
from vision.inputs.tokens import Pixels

SECONDS = 5.0  # between a film's rows in time: it ends far behind its height and width


class FilmAlbum:
    """What follows a turn depends on its number, its pixels on its letters; conversations end after `turns` turns."""

    def __init__(self, turns=3):
        self.turns, self.encode = turns, None

    def start(self, prompt):
        return (prompt.id,)

    def step(self, state, text, used):
        state = (*state, text)
        if len(state) > self.turns:
            return TurnResult(state, None)
        kind = ("film", "stills", "words", "still")[(len(state) + (state[0] == "b")) % 4 - 2]
        return TurnResult(state, self.show(kind, len(text)))

    def picture(self, state, text):
        return None

    def show(self, kind, seed):
        """The tokens of an observation."""
        if kind == "words" or self.encode.image_token is None:
            return self.encode(Prompt("seen", {"question": "look again: " + "a" * (1 + seed % 3)}))
        if kind == "film":
            return self.encode.tokens(*film(self.encode, seed))
        shown = [still(self.encode, seed + k) for k in range(2 if kind == "stills" else 1)]
        tensors = {k: torch.cat([p.tensors[k] for _, p in shown]) for k in shown[0][1].tensors}
        pixels = Pixels("/".join(p.key for _, p in shown), tensors)
        return self.encode.tokens("".join(text for text, _ in shown) + "which?", pixels)


def film(encode, seed, frames=5, size=(64, 96)):
    """(text, pixels) of a film, its placeholders as the family writes them."""
    rows, grid = patched(encode, seed, frames, size)
    opening, closing, _, pad = marks(encode)
    pads = pad * (grid[1] * grid[2] // 4)
    if encode._model.config.model_type == "qwen3_vl":
        text = "".join(f"<{t}.0 seconds>{opening}{pads}{closing}" for t in range(grid[0]))
    else:
        text = f"{opening}{pads * grid[0]}{closing}"
    return text + "now?", Pixels(f"film-{seed}-{frames}-{size}-{SECONDS}", tensors(rows, grid), SECONDS)


def still(encode, seed, size=(64, 64)):
    """(text, pixels) of a picture."""
    rows, grid = patched(encode, seed, 1, size)
    opening, closing, pad, _ = marks(encode)
    return f"{opening}{pad * (grid[1] * grid[2] // 4)}{closing}", Pixels(f"still-{seed}-{size}", tensors(rows, grid))


def patched(encode, seed, frames, size):
    drawn = np.random.default_rng(seed).integers(0, 256, (frames, *size, 3), dtype=np.uint8)
    pictures = encode.processor.image_processor
    return patchify(drawn, patch=16, merge=2, norm=Norm(tuple(pictures.image_mean), tuple(pictures.image_std)))


def marks(encode):
    config = encode._model.config
    ids = (config.vision_start_token_id, config.vision_end_token_id, config.image_token_id, config.video_token_id)
    return encode.tokenizer.convert_ids_to_tokens(ids)


def tensors(rows, grid):
    return {"pixel_values": torch.from_numpy(rows), "image_grid_thw": torch.tensor([grid])}


def prompts(images=()):
    """Two questions, one with these pictures."""
    return [
        Prompt("a", {"question": "count it", "images": list(images)}),
        Prompt("b", {"question": "how many are red"}),
    ]
