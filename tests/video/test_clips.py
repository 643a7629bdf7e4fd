"""The built-in task: what is drawn, what survives encoding, ground truth, and the fast forward of its base model."""

import numpy as np
import pytest
import torch

from mmrl.rollout import Sample
from mmrl.seeding import numpy_generator
from video.acting.actions import VideoState, act, parse_turn
from video.reading.reader import VideoReader
from video.tasks.clips import ClipAnswer, ClipsTask
from video.tasks.clips_base import solved, written_logits
from video.tasks.clips_model import new_model, new_processor
from video.tasks.clips_scene import FRAMES, SECONDS, SIZE, draw, sample_clip, solve


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMRL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield ClipsTask(train=6, held_out=4)


def test_films_are_real_files_with_the_drawn_frames(task):
    with VideoReader() as reader:
        info = reader.info(task.prompts[0].inputs["videos"][0])
        assert (info.frames, info.width, info.height) == (FRAMES, SIZE, SIZE)
        assert info.duration == pytest.approx(SECONDS, abs=0.1)
        shown = reader.read(info.path, range(FRAMES)).pixels
    clip = sample_clip(numpy_generator("film", 0, "train", 0), "train", contrast=(0.15, 0.3))
    assert np.abs(shown.astype(int) - draw(clip, range(FRAMES)).astype(int)).mean() < 4


def test_reference_chains_are_carried_out_and_right(task):
    for prompt in [*task.prompts, *task.eval_prompts]:
        starts = np.arange(FRAMES) * SECONDS / FRAMES
        state = VideoState.start(starts, SECONDS, (SIZE, SIZE), coords="norm1000")
        *looks, answer = prompt.reference["steps"]
        for text in looks:
            state, shown, problem = act(state, parse_turn(text, "videocom"))
            assert problem is None and len(shown) == 1
        assert parse_turn(answer, "videocom").answer == prompt.reference["answer"]
    solutions = [Sample(p, "\n".join(p.reference["steps"]), 0) for p in task.prompts]
    judged = task.judges(solutions)
    assert judged["accuracy"] == 1 and judged["manipulation_f1"] == 1


def test_wrong_answers_and_looks_score_less(task):
    prompt = task.prompts[0]
    other = "FIND_SEGMENT(event) = 1" if prompt.reference["segment_ids"] != [1] else "FIND_SEGMENT(event) = 2"
    wrong = Sample(prompt, f"{other}\nFINAL_ANSWER: nothing", 0)
    assert ClipAnswer()([wrong]) == [0.0]
    assert task.judges([wrong])["manipulation_f1"] == 0


def test_splits_share_no_layout_and_contrasts_are_checked():
    rng = numpy_generator("x")
    drawn = {s: {(c.frame, c.cell, c.colour) for c in (sample_clip(rng, s, contrast=(0.5, 1.0)) for _ in range(300))}
             for s in ("train", "held_out", "sft")}  # fmt: skip
    assert not drawn["train"] & drawn["held_out"] and not drawn["train"] & drawn["sft"]
    with pytest.raises(ValueError, match="contrast"):
        sample_clip(rng, "train", contrast=(0.5, 0.2))


def test_the_fast_forward_equals_the_agents(task, tmp_path):
    """The base learns on drawn clips by a forward of its own: same tokens, positions and, on the same pixels, logits."""
    from video.agent import video_agent
    from video.encoding import Views

    torch.manual_seed(0)
    model = new_model().eval()
    model.save_pretrained(tmp_path / "m")
    new_processor().save_pretrained(tmp_path / "m")
    agent = video_agent(
        str(tmp_path / "m"), coords="norm1000", hints=False, views=Views(16, 4, 256, 1024, 256), max_context=256,
        max_prompt_tokens=128, max_new_tokens=12, max_steps=4,
    )  # fmt: skip
    prompt = next(p for p in task.prompts if p.inputs["question"].startswith("colour"))
    number = int(prompt.id.rsplit("/", 1)[1])
    clip = sample_clip(numpy_generator("film", 0, "train", number), "train", contrast=(0.15, 0.3))
    episode = solved(clip, "colour")
    assert episode.turns == solve(clip, "colour") == prompt.reference["steps"]
    written = agent.write([prompt], ["\n".join(episode.turns)])
    trees, _, _ = agent._trees.of_steps(written, torch.arange(len(written.tree)))
    packed = trees[0].packed
    assert packed.ids.tolist() == episode.ids
    assert torch.equal(trees[0].positions, episode.positions)
    with torch.no_grad():
        logits = written_logits(model, [episode], episode.looks).log_softmax(-1)
    said = torch.tensor(episode.ids)[torch.tensor(episode.is_written)]
    fast = logits.gather(-1, said[:, None])[:, 0]
    real = agent.log_probs(written, torch.arange(len(written.tree))).logp
    torch.testing.assert_close(fast, real, atol=0.1, rtol=0)  # encoding changes pixels a little, and untold ids differ


def test_the_answer_of_a_task_is_the_last_turn_of_a_right_conversation(task):
    for prompt in task.prompts:
        assert "".join(task.answer(prompt)) == prompt.reference["steps"][-1]
