"""A corpus of rows that nobody meant to write, and every reader of rows with a good row of its own."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from diffusion.tasks.text_prompts import load_prompts as load_texts
from mmrl.reasoning.bench.base import Benchmark
from mmrl.reasoning.formats import read_format as read_solutions
from mmrl.reasoning.questions import Columns
from mmrl.reasoning.records_io import check_record, read_records, record_to_json
from mmrl.registry import find
from video.formats import read_format as read_films
from video.formats.ui_s1 import read_trajectories, step_prompts
from video.records import to_prompt
from vision.tasks.jsonl import load_prompts, row_prompt
from vision.tasks.puzzles import puzzle_prompt

# ---- what is put in the place of a value ----------------------------------------------------------------------------

HOSTILE = [
    None, True, "", " ", "\n", "x" * 300, "x" * 100_000, "a/" * 3000, "\0", "../../etc/passwd", "/etc/passwd", "\ud83d",
    10**400, -(10**400), 10**30, 2**63, -1, 0.5, 1e308, "9" * 400, "9" * 5000, "-" * 100_000 + "1", [], {}, [[]], [["a"]],
    [None], [10**400], [[10**400, 1]], {"a": {}}, "<image>", "<video>", "<|video_pad|>", "eps.png", "huge.png", "thin.png",
    "moving.gif", ["eps.png"], [["a"] * 3], "[" * 5000, "Options:", "FINAL_ANSWER:", "<answer>", "A.", [{"box": [10**400] * 4}],
    "['Reasoning', " + "9" * 5000 + "]", "[" * 5000 + "]" * 5000, {"text": ["a"]}, [{"text": None}], "ки", "Step 1:", "a<prm>",
    "data:image/png;base64,!", "data:", "http://example.org/a.png", {"bytes": "x"}, {"role": "tool", "content": "x"}, [["a", "b"]],
]  # fmt: skip

# texts of a value that no JSON writer makes -> what is told of the row
BROKEN = {
    "a key twice": (b'1, "extra": 2', "stands twice"),
    "a key twice inside": (b'{"k": 1, "k": 2}', "stands twice"),
    "too deep": (b"[" * 5000 + b"]" * 5000, "no JSON"),
    "many digits": (b"9" * 5000, "no JSON"),
    "not a number": (b"NaN", "no JSON value"),
    "endless": (b"-Infinity", "no JSON value"),
    "too large": (b"1e999", "too large"),
    "half of a character": (b'"\\ud83d"', "half of a character"),
    "half of a character, raw": (b'"\xed\xa0\xbd"', "no JSON"),
    "another encoding": (b'"\xe4"', "no JSON"),
    "cut": (b'"', "no JSON"),
}

# what a long text is made of; a quadratic reader takes seconds for 16,000 blanks
LONG = {
    "blanks": " ", "line breaks": "\n", "brackets": "[", "minus": "-", "marks": "<image>", "films": "<video> ", "digits": "1",
    "words": "word ", "options": "Options: A. ", "answers": "<answer>", "ends": "</answer>", "finals": "FINAL_ANSWER",
    "zooms": "SPATIAL_ZOOM(", "boxes": ") = [1, 2, 3, 4]", "prm": "<prm>", "ки": "ки", "steps": "Step 1:", "quotes": '\\"',
    "tags": "<step><step_1>", "headers": "### Step 1: ", "specials": "<|reasoning_start|><|answer_start|>",
}  # fmt: skip


def mutated(value: Any, put: Any) -> Iterator[Any]:
    """Copies of a row with `put` in the place of each value in it, however deep; a function makes it of the value."""
    yield put(value) if callable(put) else put
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        for inner in mutated(part, put):
            copy: Any = dict(value) if isinstance(value, dict) else list(value)
            copy[key] = inner
            yield copy


def lengthened(row: dict[str, Any], text: str) -> list[Any]:
    """Copies of a row with a text in the place of each value, and at both ends of each text."""
    ends = [
        lambda own: own + text if isinstance(own, str) else own,
        lambda own: text + own if isinstance(own, str) else own,
    ]
    changed = [variant for put in ends for variant in mutated(row, put) if variant != row]
    return [*mutated(row, text), *changed]


def write_media(folder: Path) -> None:
    """A clip by name alone, a good picture, and those that no policy takes."""
    for name in ("a.mp4", "a"):
        (folder / name).write_bytes(b"only its name matters")
    Image.new("RGB", (16, 16)).save(folder / "good.png")
    (folder / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n" * 9)
    Image.new("1", (9400, 9400)).save(folder / "huge.png")
    Image.new("L", (60_000, 1)).save(folder / "thin.png")
    two = [Image.new("L", (4, 4), v) for v in (0, 255)]
    two[0].save(folder / "moving.gif", save_all=True, append_images=two[1:])
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:60])


# ---- the readers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """A good row, how a file of such rows is read, and what is done with what it gives.

    name: the field that must differ from row to row. stem: of the file. keyed: the file is one object of rows.
    """

    row: dict[str, Any]
    load: Callable[[Path, Path], tuple[list[Any], list[Any]]]
    use: Callable[[Any], str]
    name: str = "id"
    stem: str = "rows"
    keyed: bool = False

    def write(self, folder: Path, rows: list[bytes]) -> Path:
        """A file of rows."""
        if self.keyed:
            path = folder / f"{self.stem}.json"
            path.write_bytes(b"{" + b",\n".join(b'"a%s": %s' % (b"/." * i, row) for i, row in enumerate(rows)) + b"}")
        else:
            path = folder / f"{self.stem}.jsonl"
            path.write_bytes(b"\n".join(rows))
        return path

    def named(self, row: Any, number: int) -> Any:
        """The row with an id of its own, where it still has the good row's."""
        same = isinstance(row, dict) and self.name in self.row and row.get(self.name) == self.row[self.name]
        return row | {self.name: f"{self.row[self.name]}{number}"} if same else row


def _solution(record: Any) -> str:
    return json.dumps(record_to_json(check_record(record, unlabelled=True)), ensure_ascii=False, allow_nan=False)


def _prompt(prompt: Any) -> str:
    return json.dumps([prompt.id, prompt.inputs, prompt.reference], ensure_ascii=False, allow_nan=False)


def _film(sample: Any) -> str:
    return _prompt(to_prompt(sample)) if sample.is_located else sample.question


def _screens(trajectory: Any) -> str:
    return "".join(map(_prompt, step_prompts(trajectory)))


def _item(item: Any) -> str:
    return "".join(map(_solution, item.records))


def _read_solutions(name: str | dict[str, Any], path: Path, root: Path) -> tuple[list[Any], list[Any]]:
    return read_solutions(path, name, media_root=root, max_bad=1.0, unlabelled=True)


def _read_records(path: Path, root: Path) -> tuple[list[Any], list[Any]]:
    return read_records(path, root, ["<prm>"], 1.0, unlabelled=True)


def _read_bench(name: str, path: Path, root: Path) -> tuple[list[Any], list[Any]]:
    bench = find("benchmarks", name).target
    assert isinstance(bench, Benchmark)
    return bench.read(path, media_root=root, max_bad=1.0)


def _read_questions(path: Path, root: Path) -> tuple[list[Any], list[Any]]:
    sizes: dict[Path, tuple[int, int]] = {}
    return load_prompts(path, lambda row, name: row_prompt(row, name, Columns(), root, sizes), max_bad=1.0)


def _read_puzzles(path: Path, root: Path) -> tuple[list[Any], list[Any]]:
    sizes: dict[Path, tuple[int, int]] = {}
    return load_prompts(path, lambda row, name: puzzle_prompt(row, name, root, sizes), max_bad=1.0)


def _read_films(name: str, path: Path, root: Path) -> tuple[list[Any], list[Any]]:
    return read_films(path, name, media_root=root, max_bad=1.0)


def _read_screens(path: Path, root: Path) -> tuple[list[Any], list[Any]]:
    return read_trajectories(path, media_root=root, max_bad=1.0)


def _read_texts(path: Path, root: Path) -> tuple[list[Any], list[Any]]:
    return load_texts(path, "prompt", max_bad=1.0)


def _said(asks: str, answers: str, who: str, what: str, *turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{who: w, what: t} for step, verdict in turns for w, t in ((asks, step), (answers, verdict))]


_FIRST = "### Question:\n<image>\nQ?\n\n### Solution Process:\n"
_CHAT = _said("human", "gpt", "from", "value", (_FIRST + "one", "+"), ("two", "-"))
_VL = _said(
    "human", "gpt", "from", "value", (_FIRST + "[Visual Elements]\n<step_1>\nA dot.\n</step_1>", "+"),
    ("[Reasoning]\n<step_1>\nTwo.\n</step_1>", "-"),
)  # fmt: skip
_NODE = {"partial_solution": ["a"], "text": "a", "mc_value": 0.5, "counts": [1, 2], "visit_count": 0, "children": []}

SOLUTIONS: dict[str, dict[str, Any]] = {
    "visualprm": {"id": "i", "image": "good.png", "conversations": _CHAT},
    "visualprm_raw": {
        "id": "i", "image": ["good.png"], "question": "<image>\nQ?", "question_orig": "Q?", "answer": 5, "response": "abc",
        "steps_with_score": [{"step": "a", "score": 0.25, "num_mc_correct": 4, "num_mc_total": 16}],
    },
    "vlprm": {
        "id": "i", "image": "good.png", "conversations": _VL, "first_incorrect_step": "['Reasoning', 0]",
        "rollout_ground_truth_answer": "2", "source": "s",
    },
    "rlhflow": {"id": "i", "conversations": _said("user", "assistant", "role", "content", ("Q? Step 1: a", "+"), ("Step 2: b", "-"))},
    "math_shepherd": {"id": "i", "input": "Q? Step 1: a ки\nStep 2: b ки", "label": "Q? Step 1: a +\nStep 2: b -", "task": "t"},
    "prm800k": {
        "question": {"problem": "Q?", "ground_truth_answer": "5"},
        "label": {"finish_reason": "solution", "steps": [
            {"completions": [{"text": "a", "rating": 1}, {"text": "b", "rating": -1}], "human_completion": None, "chosen_completion": 0},
            {"completions": [{"text": "c", "rating": None}], "human_completion": {"text": "d"}, "chosen_completion": None},
        ]},
    },
    "trl": {"id": "i", "prompt": "Q?", "completions": ["a", "b"], "labels": [True, 0.5], "images": ["good.png"]},
    "mm_prm": {
        "id": "i", "image": "good.png",
        "conversations": _said("human", "gpt", "from", "value", ("Question: Q?\nProcess: a<prm>\n\nb<prm>", [0.75, 0.0])),
    },
    "mm_prm_tree": {
        **_NODE, "id": "i", "question": "Q?", "answer": "4", "image_path": "good.png", "partial_solution": [],
        "children": [{**_NODE, "children": [_NODE]}],
    },
    "math_aps_tree": {"id": "i", "question": "Q?", "final_answer": "3", "reasoning_steps": {**_NODE, "text": "Q?", "children": [_NODE]}},
    "math_aps_flat": {
        "id": "i", "question": "Q?", "final_answer": "3", "reasoning_steps": [
            {"solution_prefix": "Q?", "mc_value": 0.5}, {"solution_prefix": "Q? a", "mc_value": 1}, {"solution_prefix": "Q? a b", "mc_value": 0.0},
        ],
    },
    "processbench": {"id": "i", "generator": "m", "problem": "Q?", "steps": ["a", "b"], "final_answer_correct": False, "label": 1},
    "prmbench": {
        "idx": "i", "classification": "circular", "question": "Q?", "modified_question": "Q?", "ground_truth": "5",
        "modified_process": ["1. a", "2. b"], "error_steps": [2],
    },
    "visualprocessbench": {
        "id": "i", "image": ["good.png"], "question": "Q?", "answer": "4", "data_source": "MMMU",
        "response": {"steps": ["a", "b"], "process_correctness": [1, -1]},
    },
    "puzzlevqa_steps": {
        "id": "i", "image": "good.png", "question": "Q?", "options": ["1", 2], "answer": "2", "steps": ["a", "b"],
        "step_kinds": ["perception", "reasoning"], "labels": [1, 0], "first_error": 1, "final_correct": True, "edit": None,
    },
    "records": {
        "id": "i", "question": "Q?", "steps": ["a", {"text": "b", "kind": "reasoning"}], "images": ["good.png"], "options": ["1", "2"],
        "answer": "1", "labels": [1, 0.0], "label_kind": "hard", "scope": "local", "first_error": 1, "final_correct": False,
        "mc": [{"value": 1.0, "correct": 4, "total": 4}, {"correct": 0, "total": 4}], "judge": [{"verdict": "no"}], "source": "s", "meta": {"k": [1]},
    },
    "responses": {"id": "i", "question": "Q?", "response": "one\n\ntwo", "images": ["good.png"], "answer": "5"},
}  # fmt: skip

# responses in each layout that steps are read by
LAYOUTS = {
    "newline": "one\ntwo",
    "numbered": "Step 1: a\nStep 2: b\n†Answer: 5",
    "tags": "<step>a</step><answer>5</answer>",
    "sectioned_tags": "[Visual Elements]<step_1>a</step_1>[Reasoning]<step_1>b</step_1><correct_answer>5</correct_answer>",
    "headers": "### Image Description: a ### Rationales: b ### Step 1: c ### The final answer is: 5",
    "special_tokens": "<|reasoning_start|><|reasoning_step_start|><|reasoning_step_name_start|>n<|reasoning_step_name_end|>"
    "<|reasoning_step_thought_start|>t<|reasoning_step_thought_end|><|reasoning_step_end|><|reasoning_end|>"
    "<|answer_start|>5<|answer_end|>",
    "paragraph_tags": "<paragraph_0>a</paragraph_0><paragraph_1>b</paragraph_1>",
}

FILMS: dict[str, dict[str, Any]] = {
    "canonical": {
        "id": "i", "question": "What?", "video": "a.mp4", "options": ["red", "blue"], "answer": "A", "answer_type": "multiple choice",
        "segments": [[0, 1]], "segment_ids": [1], "frames": [[0, 1]], "boxes": [{"frame": 0, "box": [0, 0, 1, 1]}],
        "turns": ["FINAL_ANSWER: A"], "turn_boxes": "seen", "frame_count": 9, "duration": 2.0, "size": [4, 4], "meta": {},
    },
    "video_r1": {
        "problem_id": "7", "problem": "What?", "data_type": "video", "problem_type": "free-form", "options": [],
        "path": "a.mp4", "solution": "<answer>red</answer>", "process": "<think>hm</think>",
    },
    "videocom": {
        "id": "i", "video": "a.mp4", "conversations": [
            {"from": "human", "value": "<video>\nWhat? Options: A. red, B. blue"},
            {"from": "gpt", "value": "FINAL_ANSWER: A. red"},
        ],
        "valid_segments": [1], "valid_frames": [[1, 2]], "valid_bounding_box": [[1, [0, 0, 9, 9]]],
    },
    "videochat_r1": {"duration": 3.0, "timestamps": [[0, 1]], "sentences": ["a door opens."]},
}  # fmt: skip
SCREENS = {
    "id": "i", "goal": "g", "steps": [
        {"action_content": {"action": "click", "coordinate": [1, 2], "bbox": [0, 0, 9, 9]}, "screenshot": "good.png", "thought": "t"},
    ],
}  # fmt: skip
QUESTION = {
    "id": "i",
    "question": "<image>\nWhat?",
    "images": ["good.png"],
    "answer": "A",
    "options": ["red", "blue"],
    "level": 3,
}
_PART = {"type": "image", "image": "good.png"}
TALKS: dict[str, dict[str, Any]] = {
    "messages": {"id": "i", "messages": [
        {"role": "system", "content": "Look."}, {"role": "user", "content": [_PART, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A dot."},
    ]},
    "conversations": {"id": "i", "image": "good.png", "conversations": [
        {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dot."},
    ]},
    "turns after others": {"id": "i", "prompt": [{"role": "user", "content": "And now?"}], "answer": 3, "history": [["What?", "A dot."]]},
}  # fmt: skip
PUZZLE = {
    "id": "i",
    "question": "What?",
    "image": "good.png",
    "answer": "2",
    "options": [1, 2],
    "task": "t",
    "caption": "c",
}
BENCHES: dict[str, tuple[str, dict[str, Any]]] = {
    "step_correctness": ("mpbench", {"id": "i", "question": "Q?", "image": "good.png", "steps": ["a", "b"], "labels": [1, -1]}),
    "answer_aggregation": (
        "mpbench", {"id": "i", "question": "Q?", "candidates": [{"steps": ["a"], "answer": "4", "correct": True}]},
    ),
    "reasoning_process_search": (
        "mpbench", {"id": "i", "question": "Q?", "prefix": ["a"], "candidates": [{"step": "b", "correct": True}]},
    ),
    "hard2verify": ("hard2verify", {"unique_id": "i", "question": "Q?", "model_response_by_step": ["a", "b"], "human_labels": [1, 0]}),
    "redundency": ("prmbench", {
        "idx": "i", "classification": "redundency", "question": "Q?", "original_question": "Q?", "modified_question": "Q?",
        "original_process": ["1. a"], "modified_process": ["1. a", "2. b"], "error_steps": [2],
    }),
}  # fmt: skip

READERS: dict[str, Reader] = {
    name: Reader(row, partial(_read_solutions, name), _solution, "idx" if name == "prmbench" else "id")
    for name, row in SOLUTIONS.items()
}
for _layout, _text in LAYOUTS.items():
    _format = {"name": "responses", "steps": _layout}
    READERS[f"responses {_layout}"] = Reader(
        SOLUTIONS["responses"] | {"response": _text}, partial(_read_solutions, _format), _solution
    )
READERS["record files"] = Reader(SOLUTIONS["records"], _read_records, _solution)
for _stem, (_bench, _row) in BENCHES.items():
    READERS[f"bench {_stem}"] = Reader(_row, partial(_read_bench, _bench), _item, next(iter(_row)), _stem)
for _name, _row in FILMS.items():
    READERS[_name] = Reader(
        _row,
        partial(_read_films, _name),
        _film,
        "problem_id" if _name == "video_r1" else "id",
        keyed=_name == "videochat_r1",
    )
READERS["ui_s1"] = Reader(SCREENS, _read_screens, _screens)
READERS["questions"] = Reader(QUESTION, _read_questions, _prompt)
for _name, _row in TALKS.items():
    READERS[f"questions in {_name}"] = Reader(_row, _read_questions, _prompt)
READERS["puzzles"] = Reader(PUZZLE, _read_puzzles, _prompt)
READERS["text prompts"] = Reader({"id": "i", "prompt": "a red dot", "count": 3}, _read_texts, _prompt)
