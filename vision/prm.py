"""A vision-language process reward model: one score per step, all steps of a tree of solutions in one pass."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from vision.forward.backbone import Backbone, by_prompt, closure, micro_batches, trainable_model
from vision.forward.lora import LoraOptions, merged, trained_options
from vision.forward.network import Network, StepHead, read_job
from vision.forward.passes import TokenTree, build_reading
from vision.inputs.loading import banned_ids, eos_ids, load_processor, save_model
from vision.inputs.options import PolicyOptions
from vision.inputs.tokens import PromptTokens

log = logging.getLogger(__name__)


def _untrained(options: Mapping[str, Any]) -> str:
    """Why a scorer of these options gives random numbers; "" = it does not."""
    model, head = str(options["model"]), options["head"] or "linear"
    if head == "tokens" or (Path(model) / RECORD).is_file():
        return ""
    return f"head {head} on the plain model {model!r}, which has no {RECORD}"


HEADS = {"tokens": 0, "linear": 1, "likelihood": 1, "buffer": 3}  # outputs; "tokens" compares the model's own logits
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
            for p in bare(hf).get_output_embeddings().parameters():  # unused: DDP would wait for its gradient
                p.requires_grad_(False)
        self.model: nn.Module = network
        turns = format.markers == "turns"
        self._body = Backbone(network, processor, options, opening=format.opening if turns else None)
        closing, between = self._body.encode.turns() if turns else ("", "")
        self._slots: SlotIds = slot_ids(format, self._encode_text, between, closing)
        self._verdict = tuple(self._encode_text(t)[0] for t in (format.positive, format.negative) if t)
        ends = eos_ids(bare(hf), self._body.tokenizer)  # a written turn end would make turns of its own
        self._refused = {*banned_ids(hf.config, self._body.tokenizer), *ends, *self._special_marker()}
        self._known: dict[str, list[int] | None] = {}
        self.dropped = 0  # steps without score so far, each time they were met: too long, or with a marker inside

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
        saved = _record(model)
        asked: dict[str, Any] = {"head": head, "format": format or {}, "instruction": instruction, "system": system}
        told = asked | {"head": head or "linear"} if saved is None else _agreed(saved, asked, model)
        options = PolicyOptions(
            instruction=told["instruction"], system=told["system"], max_prompt_tokens=max_length,
            max_tokens=max_tokens, mode=mode, gradient_checkpointing=gradient_checkpointing,
        )  # fmt: skip
        lora = LoraOptions(lora_rank, lora_alpha, lora_targets)
        hf = trainable_model(model, dtype, attn, lora, train_vision, gradient_checkpointing)
        if not train_language:
            for p in hf.parameters():
                p.requires_grad_(False)
        out = cls(hf, load_processor(model), StepFormat(**told["format"]), told["head"], options)
        if saved is not None and (own := out._network.head) is not None:
            own.load_state_dict(load_file(Path(model) / "head.safetensors"))
        return out

    # ---- StepScorer -------------------------------------------------------------------------------------------

    def __call__(self, rollout: Rollout) -> Tensor:
        """(N,) float64 probability that each step is good; NaN for blank steps and those that cannot be read."""
        return probabilities(self, rollout)

    def begin_iteration(self) -> None:
        """Let go of the last iteration's prompts and pictures; see `mmrl.capabilities.EncodingCache`."""
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
        taken = {p.id for p in self.admit(rollout.prompts)}
        room = [
            self.options.max_prompt_tokens - len(self._body.encode(p).ids) if p.id in taken else 0
            for p in rollout.prompts
        ]
        used, good = [0] * len(tree), torch.zeros(len(tree), dtype=torch.bool)
        for v, (p, g) in enumerate(zip(tree.parent.tolist(), tree.group.tolist(), strict=True)):
            ids = self._step_ids(rollout.texts[v])
            above = used[p] if p >= 0 else 0
            joined = len(self._slots.between) if above and ids else 0
            used[v] = room[g] + 1 if ids is None else above + joined + len(ids)
            good[v] = bool(ids) and used[v] <= room[g]
        lost = int((~good).sum()) - sum(self._step_ids(t) == [] for t in rollout.texts)
        if lost:
            self.dropped += lost
            self._body.log_once("dropped", logging.WARNING, f"{lost} steps of a batch have no score: too long, with a "
                            "marker inside, or of a prompt that was left out; `dropped` counts them")  # fmt: skip
        return good

    def micro_batches(self, rollout: Rollout, steps: Tensor, *, whole_prompts: bool = False) -> list[Tensor]:
        """Steps of whole prompts while their trees fit in `max_tokens`; a larger tree is cut along its branches."""
        sizes = [len(self._step_ids(t) or ()) for t in rollout.texts]
        groups = rollout.tree.group[steps].unique().tolist()
        prompt_sizes = {g: len(self._body.encode(rollout.prompts[g]).ids) for g in groups}
        return micro_batches(rollout.tree, steps, sizes, prompt_sizes, self.options.max_tokens, whole_prompts)

    def logits(self, rollout: Rollout, steps: Tensor) -> Tensor:
        """(S, C) float32, one row per step of `steps`: C = 1, the log-odds of "good"; C = 3 for a buffer head.

        Raises:
            ValueError: a step without a slot; see `readable`.
        """
        return self._read(self._trees(rollout, steps))

    def root_scores(self, rollout: Rollout) -> Tensor:
        """(G,) float64 score of every prompt with nothing written yet: read where an empty first step would be; NaN
        for one that cannot be encoded."""
        closing = list(self._slots.closing)
        out: list[Tensor] = []
        part: list[PromptTokens] = []
        used = 0
        taken = {p.id for p in self.admit(rollout.prompts)}
        for prompt in rollout.prompts:
            if prompt.id not in taken:
                continue
            encoded = self._body.encode(prompt)
            size = len(encoded.ids) + len(closing)
            if part and used + size > self.options.max_tokens:
                out.append(self._root_logits(part, closing))
                part, used = [], 0
            part.append(encoded)
            used += size
        scores = torch.full((len(rollout.prompts),), torch.nan, dtype=torch.float64)
        if part:
            out.append(self._root_logits(part, closing))
            values = good_logit(torch.cat(out)).sigmoid().double().cpu()
            check_finite(values, "the network of scorer VisionPrm", "prompts")
            scores[[g for g, p in enumerate(rollout.prompts) if p.id in taken]] = values
        return scores

    @torch.no_grad()
    def _root_logits(self, prompts: Sequence[PromptTokens], closing: Sequence[int]) -> Tensor:
        """(P, C) outputs after each of a few prompts and the marks that close an empty step."""
        trees, slots = [], []
        for prompt in prompts:
            ids = [prompt.ids, *([torch.tensor(closing)] if closing else [])]
            trees.append(TokenTree(prompt, [-1, 0][: len(ids)], ids))
            slots.append(torch.tensor([len(prompt.ids) + len(closing) + self._slots.read]))
        none = [torch.empty(0, dtype=torch.int64)] * len(trees)
        return self._read(_Asked(trees, slots, none, none[0], torch.arange(len(trees))))

    def attributions(self, rollout: Rollout) -> Tensor:
        """(N,) float64 gradient times input: how much the embeddings of each step's tokens, its marks included, push
        the logit of the last step that can be read below it; 0 for steps behind that one. Of chains."""
        tree, readable = rollout.tree, self.readable(rollout)
        out = torch.zeros(len(tree), dtype=torch.float64)
        for leaf in tree.is_leaf.nonzero().flatten().tolist():
            last = leaf
            while last >= 0 and not readable[last]:
                last = int(tree.parent[last])
            if last >= 0:
                nodes, parts = self._attribution(rollout, last)
                out[nodes] = parts
        return out

    def _attribution(self, rollout: Rollout, last: int) -> tuple[list[int], Tensor]:
        """The steps to `last`, and by how much its logit grows with the length of each one's embeddings."""
        asked = self._trees(rollout, torch.tensor([last]))
        nodes, _ = closure(rollout.tree, [last])
        wanted = asked.tokens if self.head == "likelihood" else []
        job = build_reading(asked.trees, asked.slots, "rows", self._body.style, wanted)
        hf = self._network.hf
        scales: list[Tensor] = []

        def scale(module: nn.Module, inputs: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
            # d logit / d scale of a token = gradient times input, summed over its width
            scales.append(torch.ones(embedded.shape[:-1], device=embedded.device, requires_grad=True))
            return embedded * scales[-1][..., None].to(embedded.dtype)

        hook = bare(hf).get_input_embeddings().register_forward_hook(scale)
        try:
            with torch.enable_grad():
                hf.train(False)
                outputs = self._network(read_job, job, self._verdict, asked.owner, self._body.features, None)
                (gradient,) = torch.autograd.grad(good_logit(outputs).sum(), scales[0])
        finally:
            hook.remove()
        of_token = asked.trees[0].packed.node  # 0 is the prompt, the steps follow in order
        total = torch.zeros(len(nodes) + 1, dtype=torch.float64).index_add(0, of_token, gradient[0].double().cpu())
        return nodes, total[1:]

    def _read(self, asked: _Asked) -> Tensor:
        """(S, C) outputs at the slots, in the caller's order."""
        body, wanted = self._body, asked.tokens if self.head == "likelihood" else []
        job = body.job(
            asked.trees,
            lambda mode: build_reading(asked.trees, asked.slots, mode, body.style, wanted),
            sharded=is_sharded(self._network),
        )
        grad = torch.is_grad_enabled()
        self._network.hf.train(grad and self.options.gradient_checkpointing)
        model = self.model if grad else self._network
        blank = body.blank if grad else None
        out = model(read_job, job, self._verdict, asked.owner, body.features, blank)
        return out[torch.argsort(asked.order)]

    def merge_adapter(self) -> None:
        """See `mmrl.capabilities.AdapterMerger`."""
        self._network.hf = merged(self._network.hf)

    def save(self, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Model (with LoRA, the adapter) and processor in transformers' format, the head as `head.safetensors`
        (linear.weight (C, H), linear.bias (C,)), and how steps are read as `step_format.json`."""
        network, weights = self._network, None
        head = None if network.head is None else network.head.state_dict()
        if state_dict is not None:
            weights = {n.removeprefix("hf."): w for n, w in state_dict.items() if n.startswith("hf.")}
            head = head and {n.removeprefix("head."): w for n, w in state_dict.items() if n.startswith("head.")}
        save_model(network.hf, self._body.processor, folder, weights)
        if head is not None:
            save_file({k: v.detach().cpu().contiguous() for k, v in head.items()}, Path(folder) / "head.safetensors")
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
        ids = [self._encode_text(t.strip()) for t in steps]
        head = self._body.encode(prompt).ids.tolist()
        laid = lay_out(head, ids, self._slots, labels, max_length=self.options.max_prompt_tokens)
        decode = self._body.tokenizer.decode
        lines = [f"{laid.starts[0]} prompt tokens"]
        runs = zip(laid.starts, laid.starts[1:], laid.slots, laid.labels, strict=False)
        for start, end, slot, label in runs:
            told = "unlabelled" if label is None else f"label {label:g}"
            lines.append(f"{decode(laid.ids[start:end])!r}, read at {slot} {decode([laid.ids[slot]])!r}, {told}")
        return "\n  ".join([*lines, *([f"{laid.dropped} steps do not fit"] if laid.dropped else [])])

    # ---- tokens -----------------------------------------------------------------------------------------------

    @property
    def _network(self) -> ScoringNetwork:
        inner = unwrap(self.model)
        assert isinstance(inner, ScoringNetwork)
        return inner

    def _encode_text(self, text: str) -> list[int]:
        return list(self._body.tokenizer.encode(text, add_special_tokens=False))

    def _special_marker(self) -> list[int]:
        """A marker that was added to the vocabulary as one token; an ordinary text (a line end, a plus) may recur."""
        added = self._body.tokenizer.get_added_vocab()
        return [added[self.format.marker]] if self.format.marker in added else []

    def _step_ids(self, text: str) -> list[int] | None:
        """What a step puts into the context, closing included; [] for a blank one, None when it holds a marker or an
        image placeholder."""
        if text not in self._known:
            if len(self._known) > 200_000:
                self._known.clear()
            ids = self._encode_text(text.strip()) if text.strip() else []
            bad = bool(self._refused & set(ids))
            self._known[text] = None if bad else self._slots.run(ids, first=True) if ids else []
        return self._known[text]

    def _trees(self, rollout: Rollout, steps: Tensor) -> _Asked:
        """What `steps` need, prompt by prompt."""
        tree, between, after = rollout.tree, list(self._slots.between), len(self._slots.closing)
        out = _Asked([], [], [], torch.empty(0), torch.empty(0))
        owner: list[int] = []
        slots = 0
        for g, own in by_prompt(tree, steps):
            nodes, parent = closure(tree, own)
            prompt = self._body.encode(rollout.prompts[g])
            ids, written = [prompt.ids], [False]  # blank steps take no place, so the first step may have ancestors
            for v, above in zip(nodes, parent[1:], strict=True):
                run = self._step_ids(rollout.texts[v])
                if run is None:
                    raise ValueError(f"step {v} holds a marker: {rollout.texts[v][:60]!r}; score `readable` steps")
                ids.append(torch.tensor([*between, *run] if run and written[above] else run, dtype=torch.int64))
                written.append(written[above] or bool(run))
            one = TokenTree(prompt, parent, ids)
            place = {v: i + 1 for i, v in enumerate(nodes)}
            spans = []
            for v in own:
                end = int(one.packed.start[place[v]]) + len(ids[place[v]])
                spans.append((end - len(self._step_ids(rollout.texts[v]) or ()), end))
            out.trees.append(one)
            out.slots.append(torch.tensor([end for _, end in spans]) + self._slots.read)
            out.tokens.append(torch.cat([torch.arange(a, b - after) for a, b in spans]))
            for slot, (a, b) in enumerate(spans, slots):
                owner += [slot] * (b - after - a)
            slots += len(own)
        return replace(out, owner=torch.tensor(owner), order=torch.argsort(tree.group[steps], stable=True))


@dataclass(frozen=True)
class _Asked:
    """The trees of some steps. slots, tokens: packed indices per tree of the steps' slots and own tokens. owner: the
    slot of each token, counted over all trees. order: the caller's place of each slot."""

    trees: list[TokenTree]
    slots: list[Tensor]
    tokens: list[Tensor]
    owner: Tensor
    order: Tensor


def _tied(hf: Any) -> bool:
    return hf.get_output_embeddings().weight is hf.get_input_embeddings().weight


def _record(model: str) -> dict[str, Any] | None:
    file = Path(model) / RECORD
    return json.loads(file.read_text()) if file.is_file() else None


def _agreed(saved: dict[str, Any], asked: dict[str, Any], model: str) -> dict[str, Any]:
    """The saved record; what a recipe names besides must say the same."""
    for key, value in asked.items():
        kept = saved[key] if key != "format" or not value else {k: saved["format"].get(k) for k in value}
        if value and value != kept:
            raise ValueError(
                f"scorer.{key}={value!r} but {model} was trained with {kept!r}; leave it out, the model knows it"
            )
    return saved
