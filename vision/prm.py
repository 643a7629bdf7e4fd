"""A vision-language process reward model: one score per step, all steps of a tree of solutions in one pass.

    prm = VisionPrm.build("folder", head="linear")
    prm(rollout)  # (N,) probability that each step is good

A step's score is read at its slot, a place behind its last token: the tokens `step 1 <marker>` have their slot at the
marker, where a head or the logits of two tokens tell how good the step is.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmrl.finite import check_finite
from mmrl.losses.reward import good_logit
from mmrl.model_names import model_name
from mmrl.reasoning.slots import FormatOptions, SlotIds, StepFormat, lay_out, slot_ids
from mmrl.reference import Adapted, bare, unwrap
from mmrl.registry import declares
from mmrl.rollout import Prompt, Rollout
from mmrl.scorers.scoring import RECORD, probabilities
from mmrl.sharding import is_sharded
from vision.forward.backbone import Backbone, closure, micro_batches, trainable_model
from vision.forward.lora import LoraOptions, merged, trained_options
from vision.forward.network import Network, StepHead, read_job
from vision.forward.packing import Mode
from vision.forward.passes import Job, build_reading
from vision.inputs.loading import banned_ids, eos_ids, load_processor, save_model
from vision.inputs.options import PolicyOptions
from vision.inputs.tokens import PromptTokens
from vision.slot_trees import SlotTrees, StepTrees

log = logging.getLogger(__name__)


def _untrained(options: Mapping[str, Any]) -> str:
    """The reason why a scorer of these options gives random numbers; "" = it does not."""
    model, head = str(options["model"]), options["head"] or "linear"
    if head == "tokens" or (Path(model) / RECORD).is_file():
        return ""
    return f"head {head} on the plain model {model!r}, which has no {RECORD}"


# Outputs of each head; "tokens" has none and compares two logits of the model.
HEADS = {"tokens": 0, "linear": 1, "likelihood": 1, "buffer": 3}
Head = Literal["tokens", "linear", "likelihood", "buffer"]


class ScoringNetwork(Network):
    """A language model and its head as one module, so that whatever wraps it sees both."""

    def __init__(self, hf: nn.Module, head: Head) -> None:
        super().__init__(hf)
        self.head: StepHead | None = None
        if HEADS[head]:
            inner = bare(hf)
            width = inner.config.get_text_config().hidden_size
            self.head = StepHead(width, HEADS[head], head == "likelihood").to(next(inner.parameters()).device)

    def forward(self, run: Any, *args: Any, **kwargs: Any) -> Any:
        """Apply `run` to the model and the head."""
        return run(self.hf, self.head, *args, **kwargs)


class VisionPrm:
    """A StepScorer on any transformers image-text (or text) model.

    Steps are read from a rollout's texts, outer white space left out, and tokenised apart from the markers, so each
    step has exactly one slot (`mmrl.reasoning.slots`). Steps that share a prefix share its computation, and a picture
    is encoded once. Scores depend on the steps before and on the step itself, on nothing after it.

    Args:
        hf: the model, PEFT or not. processor: from `vision.inputs.loading.load_processor`.
        format: how steps are laid out and read. head: "tokens" compares the logits of the format's two tokens,
            "linear" is one logit on the last hidden state, "likelihood" adds the step's own mean log-prob to it
            (`StepHead`), "buffer" gives FreePRM's three classes right, wrong, buffer.
        options: instruction, system text, limits and layout; `max_prompt_tokens` bounds prompt and solution
            together, later steps have no score and are counted.
    Raises:
        ValueError: a head that does not fit the format, or a marker that is not one token where it must be.
    """

    def __init__(self, hf: Any, processor: Any, format: StepFormat, head: Head, options: PolicyOptions) -> None:
        if (head == "tokens") != bool(format.positive):
            raise ValueError(
                f"head={head!r} with positive={format.positive!r}: head: tokens compares two, name both; another head "
                "takes none"
            )
        self.format, self.head, self.options = format, head, options
        network = ScoringNetwork(hf, head)
        if head in ("linear", "buffer") and not _tied(bare(hf)):
            # These heads do not use the output layer, and DDP would wait for its gradient.
            for weight in bare(hf).get_output_embeddings().parameters():
                weight.requires_grad_(False)
        self.model: nn.Module = network
        turns = format.markers == "turns"
        self._body = Backbone(network, processor, options, opening=format.opening if turns else None)
        closing, between = self._body.encode.turns() if turns else ("", "")
        self._slots: SlotIds = slot_ids(format, self._encode_text, between, closing)
        self._verdict = tuple(self._encode_text(text)[0] for text in (format.positive, format.negative) if text)
        # Ids that no step may hold. A turn end written by a model would make turns of its own.
        ends = eos_ids(bare(hf), self._body.tokenizer)
        refused = {*banned_ids(hf.config, self._body.tokenizer), *ends, *self._special_marker()}
        self._trees = SlotTrees(self._body.encode, self._encode_text, self._slots, refused)
        # Steps without score so far, each time they came up: too long, or with a marker inside.
        self.dropped = 0

    @classmethod
    @declares(reads=("texts",), untrained=_untrained, trained=trained_options, recipe={"optim.lr": 1e-5})
    def build(
        cls,
        model: Annotated[str, model_name("shapes")] = "shapes",
        head: Head | None = None,
        format: FormatOptions | None = None,
        lora_rank: int = 0,
        lora_alpha: float | None = None,
        lora_targets: list[str] | str | None = None,
        train_vision: bool = False,
        train_language: bool = True,
        dtype: str = "float32",
        attn: str = "sdpa",
        instruction: str = "",
        system: str = "",
        max_length: int = 2048,
        max_tokens: int = 16384,
        mode: Literal["auto", "rows", "rows_shared_image", "packed", "prefix_packed"] = "auto",
        gradient_checkpointing: bool = False,
    ) -> VisionPrm:
        """From a recipe's `scorer:` section; a folder that `save` wrote brings its own head, format and instruction.

        Args:
            model: "shapes" (the built-in tiny model), a folder, or a hub name.
            head: default linear. format: fields of `StepFormat`.
            lora_rank: 0 trains all weights, or goes on with the adapter that `model` holds; above 0 trains a new LoRA
                on the language model, and the head.
            lora_alpha, lora_targets: see `vision.forward.lora.LoraOptions`.
            train_vision: train image encoder and projector. train_language: off, only the head trains (PURE's first
                stage).
            max_length: longest prompt with its solution, in tokens. max_tokens: most unique tokens at once.
        Raises:
            ValueError: options that contradict a saved model's record.
        """
        if model == "shapes":
            from vision.tasks.shapes_base import shapes_base

            model = str(shapes_base())
        saved = _saved_record(model)
        named: dict[str, Any] = {"head": head, "format": format or {}, "instruction": instruction, "system": system}
        if saved is None:
            record = named | {"head": head or "linear"}
        else:
            record = _agreed(saved, named, model)
        options = PolicyOptions(
            instruction=record["instruction"],
            system=record["system"],
            max_prompt_tokens=max_length,
            max_tokens=max_tokens,
            mode=mode,
            gradient_checkpointing=gradient_checkpointing,
        )
        lora = LoraOptions(lora_rank, lora_alpha, lora_targets)
        hf = trainable_model(model, dtype, attn, lora, train_vision, gradient_checkpointing)
        if not train_language:
            for weight in hf.parameters():
                weight.requires_grad_(False)
        prm = cls(hf, load_processor(model), StepFormat(**record["format"]), record["head"], options)
        trained_head = prm._network.head
        if saved is not None and trained_head is not None:
            trained_head.load_state_dict(load_file(Path(model) / "head.safetensors"))
        return prm

    # ---- StepScorer -------------------------------------------------------------------------------------------

    def __call__(self, rollout: Rollout) -> Tensor:
        """(N,) float64 probability that each step is good; NaN for blank steps and those that cannot be read."""
        return probabilities(self, rollout)

    def begin_iteration(self) -> None:
        """Give up the last iteration's prompts and pictures; see `mmrl.capabilities.EncodingCache`."""
        self._body.begin_iteration()

    def admit(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts that can be encoded; each other one is logged with its reason, once."""
        return self._body.admit(prompts)

    def readable(self, rollout: Rollout) -> Tensor:
        """(N,) bool, steps that have a slot: not blank, without markers, within `max_length`, of a prompt that can be
        encoded.

        What follows a step that cannot be read cannot be read either, since it would be judged without it.
        """
        tree = rollout.tree
        admitted = {p.id for p in self.admit(rollout.prompts)}
        # Tokens that are left behind each prompt, and those that each step takes with all before it.
        room = []
        for prompt in rollout.prompts:
            fits = prompt.id in admitted
            room.append(self.options.max_prompt_tokens - len(self._body.encode(prompt).ids) if fits else 0)
        used = [0] * len(tree)
        readable = torch.zeros(len(tree), dtype=torch.bool)
        blank = 0
        for step, (parent, group) in enumerate(zip(tree.parent.tolist(), tree.group.tolist(), strict=True)):
            ids = self._trees.step_ids(rollout.texts[step])
            if ids is None:
                # More than fits, so that no step behind it can be read either.
                used[step] = room[group] + 1
                continue
            above = used[parent] if parent >= 0 else 0
            between = len(self._slots.between) if above and ids else 0
            used[step] = above + between + len(ids)
            readable[step] = bool(ids) and used[step] <= room[group]
            blank += not ids
        lost = int((~readable).sum()) - blank
        if lost:
            self.dropped += lost
            self._body.log_once(
                "dropped",
                logging.WARNING,
                f"{lost} steps of a batch have no score: too long, with a marker inside, or of a prompt that was left "
                "out; `dropped` counts them",
            )
        return readable

    def micro_batches(self, rollout: Rollout, steps: Tensor, *, whole_prompts: bool = False) -> list[Tensor]:
        """Steps of whole prompts while their trees fit in `max_tokens`; a larger tree is cut along its branches."""
        sizes = [len(self._trees.step_ids(text) or ()) for text in rollout.texts]
        groups = rollout.tree.group[steps].unique().tolist()
        prompt_sizes = {group: len(self._body.encode(rollout.prompts[group]).ids) for group in groups}
        return micro_batches(rollout.tree, steps, sizes, prompt_sizes, self.options.max_tokens, whole_prompts)

    def logits(self, rollout: Rollout, steps: Tensor) -> Tensor:
        """(S, C) float32, one row per step of `steps`: C = 1, the log-odds of "good"; C = 3 for a buffer head.

        Raises:
            ValueError: a step without a slot; see `readable`.
        """
        return self._read(self._trees.of_steps(rollout, steps))

    def root_scores(self, rollout: Rollout) -> Tensor:
        """(G,) float64 score of every prompt with nothing written yet: read where an empty first step would be; NaN
        for one that cannot be encoded."""
        admitted = {p.id for p in self.admit(rollout.prompts)}
        groups = [group for group, prompt in enumerate(rollout.prompts) if prompt.id in admitted]
        scores = torch.full((len(rollout.prompts),), torch.nan, dtype=torch.float64)
        if not groups:
            return scores
        # Parts of prompts that fit in `max_tokens` together.
        parts: list[list[PromptTokens]] = [[]]
        used = 0
        for group in groups:
            encoded = self._body.encode(rollout.prompts[group])
            size = len(encoded.ids) + len(self._slots.closing)
            if parts[-1] and used + size > self.options.max_tokens:
                parts.append([])
                used = 0
            parts[-1].append(encoded)
            used += size
        logits = torch.cat([self._root_logits(part) for part in parts])
        values = good_logit(logits).sigmoid().double().cpu()
        check_finite(values, "the network of scorer VisionPrm", "prompts")
        scores[groups] = values
        return scores

    @torch.no_grad()
    def _root_logits(self, prompts: Sequence[PromptTokens]) -> Tensor:
        """(P, C) outputs after each of a few prompts and the marks that close an empty step."""
        return self._read(self._trees.of_prompts(prompts))

    def attributions(self, rollout: Rollout) -> Tensor:
        """(N,) float64 gradient times input: how much the embeddings of each step's tokens, its marks included, push
        the logit of the last step that can be read below it; 0 for steps behind that one. Of chains."""
        tree, readable = rollout.tree, self.readable(rollout)
        attributions = torch.zeros(len(tree), dtype=torch.float64)
        for leaf in tree.is_leaf.nonzero().flatten().tolist():
            last = leaf
            while last >= 0 and not readable[last]:
                last = int(tree.parent[last])
            if last >= 0:
                steps, values = self._attribution(rollout, last)
                attributions[steps] = values
        return attributions

    def _attribution(self, rollout: Rollout, last: int) -> tuple[list[int], Tensor]:
        """The steps to `last`, and the growth of its logit with the length of each one's embeddings."""
        read = self._trees.of_steps(rollout, torch.tensor([last]))
        steps, _ = closure(rollout.tree, [last])
        wanted = read.tokens if self.head == "likelihood" else []
        job = build_reading(read.trees, read.slots, "rows", self._body.style, wanted)
        hf = self._network.hf
        scales: list[Tensor] = []

        def scale(module: nn.Module, inputs: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
            # Every token's embedding is multiplied by a 1 of its own. The derivative of the logit by that 1 is
            # gradient times input, summed over the width.
            scales.append(torch.ones(embedded.shape[:-1], device=embedded.device, requires_grad=True))
            return embedded * scales[-1][..., None].to(embedded.dtype)

        hook = bare(hf).get_input_embeddings().register_forward_hook(scale)
        try:
            with torch.enable_grad():
                hf.train(False)
                outputs = self._network(read_job, job, self._verdict, read.owner, self._body.features, None)
                (gradient,) = torch.autograd.grad(good_logit(outputs).sum(), scales[0])
        finally:
            hook.remove()
        # Sums over the tokens of each node; node 0 is the prompt, the steps follow in order.
        node = read.trees[0].packed.node
        total = torch.zeros(len(steps) + 1, dtype=torch.float64).index_add(0, node, gradient[0].double().cpu())
        return steps, total[1:]

    def _read(self, read: StepTrees) -> Tensor:
        """(S, C) outputs at the slots, in the caller's order."""
        body = self._body
        wanted = read.tokens if self.head == "likelihood" else []

        def build(mode: Mode) -> Job:
            return build_reading(read.trees, read.slots, mode, body.style, wanted)

        job = body.job(read.trees, build, sharded=is_sharded(self._network))
        # Without gradient a wrapper (DDP) has nothing to do, and ranks may differ in their number of calls.
        grad = torch.is_grad_enabled()
        self._network.hf.train(grad and self.options.gradient_checkpointing)
        model = self.model if grad else self._network
        blank = body.blank if grad else None
        outputs: Tensor = model(read_job, job, self._verdict, read.owner, body.features, blank)
        return outputs[torch.argsort(read.order)]

    def merge_adapter(self) -> None:
        """See `mmrl.capabilities.AdapterMerger`."""
        self._network.hf = merged(self._network.hf)

    def save(self, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Model (with LoRA, the adapter) and processor in transformers' format, the head as `head.safetensors`
        (linear.weight (C, H), linear.bias (C,)), and how steps are read as `step_format.json`."""
        network, weights = self._network, None
        head = None if network.head is None else network.head.state_dict()
        if state_dict is not None:
            weights = _below(state_dict, "hf.")
            head = head and _below(state_dict, "head.")
        save_model(network.hf, self._body.processor, folder, weights)
        if head is not None:
            on_host = {name: weight.detach().cpu().contiguous() for name, weight in head.items()}
            save_file(on_host, Path(folder) / "head.safetensors")
        base = bare(network.hf).config.name_or_path if isinstance(network.hf, Adapted) else None
        record = {
            "scorer": "vision_prm", "head": self.head, "format": self.format.to_json(), "base": base,
            "instruction": self.options.instruction, "system": self.options.system,
        }  # fmt: skip
        (Path(folder) / RECORD).write_text(json.dumps(record, indent=1) + "\n")

    def illustrate(self, prompt: Prompt, steps: Sequence[str], labels: Sequence[float | None]) -> str:
        """One laid-out solution as the model reads it, with its slots and labels, to look at before training.

        Raises:
            SlotError: it cannot be laid out.
        """
        ids = [self._encode_text(text.strip()) for text in steps]
        head = self._body.encode(prompt).ids.tolist()
        laid_out = lay_out(head, ids, self._slots, labels, max_length=self.options.max_prompt_tokens)
        decode = self._body.tokenizer.decode
        lines = [f"{laid_out.starts[0]} prompt tokens"]
        spans = zip(laid_out.starts, laid_out.starts[1:], strict=False)
        for (start, end), slot, label in zip(spans, laid_out.slots, laid_out.labels, strict=False):
            text, read = decode(laid_out.ids[start:end]), decode([laid_out.ids[slot]])
            with_label = "unlabelled" if label is None else f"label {label:g}"
            lines.append(f"{text!r}, read at {slot} {read!r}, {with_label}")
        if laid_out.dropped:
            lines.append(f"{laid_out.dropped} steps do not fit")
        return "\n  ".join(lines)

    # ---- tokens -----------------------------------------------------------------------------------------------

    @property
    def _network(self) -> ScoringNetwork:
        inner = unwrap(self.model)
        assert isinstance(inner, ScoringNetwork)
        return inner

    def _encode_text(self, text: str) -> list[int]:
        return list(self._body.tokenizer.encode(text, add_special_tokens=False))

    def _special_marker(self) -> list[int]:
        """The id of a marker that is a token added to the vocabulary; an ordinary text, such as a line end, may
        recur."""
        added = self._body.tokenizer.get_added_vocab()
        return [added[self.format.marker]] if self.format.marker in added else []


def _tied(hf: Any) -> bool:
    """True where the output layer and the input embeddings are one matrix."""
    return hf.get_output_embeddings().weight is hf.get_input_embeddings().weight


def _below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose names begin with `prefix`, named without it."""
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def _saved_record(model: str) -> dict[str, Any] | None:
    """The record that `save` wrote beside a model, None for a plain one."""
    file = Path(model) / RECORD
    return json.loads(file.read_text()) if file.is_file() else None


def _agreed(saved: dict[str, Any], named: dict[str, Any], model: str) -> dict[str, Any]:
    """The saved record, with which the options that a recipe names must agree."""
    for key, value in named.items():
        if not value:
            continue
        kept = saved[key]
        if key == "format":
            kept = {field: saved["format"].get(field) for field in value}
        if value != kept:
            raise ValueError(
                f"scorer.{key}={value!r} but {model} was trained with {kept!r}; leave it out, the model knows it"
            )
    return saved
