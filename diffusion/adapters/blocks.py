"""Every family that diffusers has modular blocks for, images and films, through the family's own blocks.

A family's blocks are the steps of its pipeline: texts are encoded, a batch is prepared (latents, timesteps, position
tables), the loop predicts and steps, latents are decoded. Blocks in front of the loop's group run once per prompt and
give the conditions. Those of the group run for every batch of rows, so that position tables, packing and lists fit it;
there is no network among them. Of the loop everything but the last block, which steps the scheduler, gives the guided
prediction. The blocks after it decode.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from diffusion.adapters.base import Cond, Level, text_of
from diffusion.adapters.conditions import stack_rows
from diffusion.adapters.pipeline import (
    DENOISERS,
    Dtype,
    Experts,
    PipelineAdapter,
    dtypes,
    load_pipeline,
    modular_class,
    pipeline_index,
)
from diffusion.kernels import Prediction, to_x0_eps
from mmrl.reference import bare, unwrap
from mmrl.registry import register
from mmrl.rollout import LENGTH, Prompt

DECODED_AT_ONCE = 4  # pictures; a decoder takes more memory for one than the denoiser for its latent


@register("adapters", "blocks", source="diffusers' modular pipelines")
class BlocksAdapter(PipelineAdapter):
    """A pipeline of a family with modular blocks; prompts carry `inputs["prompt"]`.

    Args:
        blocks: a ModularPipeline with its components.
        pipeline: the ordinary pipeline that they come from, which is what `save` writes; None where there is none.
        guidance_scale: None is the family's own, embedded or classifier-free; 1 of the latter is no guidance.
        negative_prompt: for classifier-free guidance, in rollout and update.
        height, width, num_frames: of the outputs; None is the family's own.
        call: further inputs of the family's blocks, such as `max_sequence_length`.
        offload_encoders: keep the encoders on the CPU but while they read prompts.
    Raises:
        ValueError: an input that the blocks do not have, or a scheduler whose noise this adapter cannot place.
    """

    prediction: Prediction = "flow"

    def __init__(
        self,
        blocks: Any,
        pipeline: Any = None,
        *,
        guidance_scale: float | None = None,
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        call: Mapping[str, Any] | None = None,
        offload_encoders: bool = False,
    ) -> None:
        from diffusers.loaders.lora_base import LoraBaseMixin

        self.blocks = blocks
        steps = blocks.blocks.get_execution_blocks(prompt=True).sub_blocks
        loop_name = next(name for name, block in steps.items() if block.sub_blocks)
        group = loop_name.partition(".")[0]
        names = list(steps)
        before, after = names[: names.index(loop_name)], names[names.index(loop_name) + 1 :]
        self._encoding = [steps[n] for n in before if n.partition(".")[0] != group]
        self._preparation = [steps[n] for n in before if n.partition(".")[0] == group]
        self._loop = steps[loop_name]
        self._loop.set_progress_bar_config(disable=True)
        self._decoding = [steps[n] for n in after]
        self._output = blocks.blocks.outputs[0].name
        called = self._networks([*self._loop.sub_blocks.values()])
        super().__init__(
            pipeline or blocks, [n for n in called if n in DENOISERS], self._networks(self._encoding), offload_encoders
        )
        # Ideogram 4's second network, which sees no prompt
        self._unconditional = [blocks.components[n] for n in called if n not in DENOISERS]
        if not isinstance(self.pipeline, LoraBaseMixin):  # HunyuanVideo 1.5's loads no LoRA, its blocks do
            self.lora_formats = blocks
        self._inputs = self._checked({"height": height, "width": width, "num_frames": num_frames, **dict(call or {})})
        self._negative_prompt = negative_prompt
        self._guide(guidance_scale)
        self._num_steps = int(self._inputs.get("num_inference_steps") or 50)
        scheduler = blocks.scheduler
        if not (type(scheduler).__name__.startswith("FlowMatch") or scheduler.config.get("use_flow_sigmas")):
            raise ValueError(
                f"policy.model: {type(scheduler).__name__} is no schedule of flow matching; this adapter serves "
                "families that predict a velocity"
            )

    @classmethod
    def from_pretrained(
        cls, folder: Path | str, *, dtype: Dtype = "float32", frozen_dtype: Dtype | None = None, **options: Any
    ) -> Self:
        """An ordinary pipeline's folder or hub name, or a modular one's where the family has no other."""
        index, local = pipeline_index(folder), {"local_files_only": Path(folder).is_dir()}
        kind = modular_class(index)
        if kind is None:
            raise ValueError(f"policy.model={str(folder)!r}: diffusers has no blocks for {index.get('_class_name')}")
        blocks = kind(pretrained_model_name_or_path=str(folder), **local)
        if "_blocks_class_name" in index:
            blocks.load_components(dtype=dtypes(dtype, frozen_dtype), **local)
            return cls(blocks, **options)
        pipeline = load_pipeline(folder, dtype, frozen_dtype)
        known = set(blocks.component_names)
        parts = {name: part for name, part in pipeline.components.items() if name in known and part is not None}
        blocks.update_components(**parts)
        return cls(blocks, pipeline, **options)

    # ---- what the family has ----------------------------------------------------------------------------------

    def _networks(self, steps: Sequence[Any]) -> list[str]:
        """Names of the networks that some blocks run; two experts in the loop of Wan 2.2."""
        wanted = [spec.name for step in steps for spec in step.expected_components]
        components = self.blocks.components
        return [name for name in dict.fromkeys(wanted) if isinstance(components[name], nn.Module)]

    def _checked(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs of the blocks: their defaults, and what the recipe says."""
        inputs = {p.name: p.default for p in self.blocks.blocks.inputs if p.name}
        wanted = {name: value for name, value in wanted.items() if value is not None}
        unknown = [name for name in wanted if name not in inputs]
        if unknown:
            raise ValueError(
                f"policy: {type(self.blocks).__name__} takes no {', '.join(unknown)}; it knows "
                f"{', '.join(sorted(inputs))}"
            )
        return inputs | wanted

    def _guide(self, scale: float | None) -> None:
        """Set the scale where the family has it: in its guiders, or as an input that is embedded."""
        if scale is None:
            return
        guiders = self._guiders()
        for guider in guiders:
            guider.enable()
            guider.guidance_scale = scale
        if "guidance_scale" in self._inputs:
            self._inputs["guidance_scale"] = scale
        elif "guidance_schedule" in self._inputs:
            self._inputs["guidance_schedule"] = [scale]
        elif not guiders:
            raise ValueError(
                f"policy.guidance_scale={scale}: {type(self.blocks).__name__} has no guidance; leave it out"
            )

    @property
    def _dtype(self) -> torch.dtype:
        # not that of the first parameter: Wan keeps some in float32
        dtype: torch.dtype = self.blocks.components[self.denoisers[0]].dtype
        return dtype

    def _guiders(self) -> list[Any]:
        """What combines several predictions; one per expert in Wan 2.2, none where guidance is embedded."""
        return [part for name, part in self.blocks.components.items() if name.startswith("guider")]

    # ---- running blocks ---------------------------------------------------------------------------------------

    def _run(self, blocks: Sequence[Any], state: Any, model: nn.Module | None = None) -> Any:
        """The state after some blocks. Where gradients are on they flow: the blocks' own no_grad is taken off."""
        components = _Components(self, model or self.model)
        for block in blocks:
            inspect.unwrap(type(block).__call__)(block, components, state)
        return state

    def _state(self, **values: Any) -> Any:
        from diffusers.modular_pipelines import PipelineState

        kinds = {p.name: p.kwargs_type for p in self.blocks.blocks.inputs if p.name}
        inputs = self._inputs | {"num_inference_steps": self._num_steps}
        if "guidance_schedule" in inputs:  # Ideogram 4's has one scale per step of its own 48
            scales = inputs["guidance_schedule"]
            steps = range(self._num_steps)
            inputs["guidance_schedule"] = [scales[int((i + 0.5) * len(scales) / len(steps))] for i in steps]
        state = PipelineState()
        for name, value in (inputs | values).items():
            state.set(name, value, kinds.get(name))
        return state

    @property
    def num_train_timesteps(self) -> int:
        """Times of the network: 0 is clean, this is pure noise."""
        return int(self.blocks.scheduler.config.num_train_timesteps)

    @property
    def text_width(self) -> int:
        """Width of the prompt's embeddings."""
        return int(self._null["prompt_embeds"].shape[-1])

    def without_guidance(self) -> None:
        """Predict by the prompt alone where guidance is classifier-free; an embedded scale stays."""
        for guider in self._guiders():
            guider.disable()

    def drop_encoders(self) -> None:
        """Let go of what reads prompts; from now on conditions come from elsewhere."""
        _ = self._null  # of the empty prompt, which shapes are read from
        for name in self._networks(self._encoding):
            for holder in (self.blocks, self.pipeline):
                setattr(holder, name, None)
        self._encoders = []

    # ---- conditions -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, prompts: Sequence[Prompt]) -> Cond:
        """What the family's encoders make of each prompt, and of the negative one where it is guided by that.

        Each prompt is encoded alone, so that its rows are the same whatever else was asked for.

        Raises:
            ValueError: a prompt without text.
        """
        return stack_rows([self._encode_text(text_of(p)) for p in prompts])

    def _encode_text(self, text: str) -> Cond:
        asked = {"prompt": text}
        if "negative_prompt" in self._inputs:
            asked["negative_prompt"] = self._negative_prompt
        with self.encoding(), self._as_if_guided():
            state = self._run(self._encoding, self._state(**asked))
        row: Cond = {}
        for block in self._encoding:
            for output in block.intermediate_outputs:
                value = state.get(output.name)
                if value is None or isinstance(value, str):  # a text that a family rewrites is read by its next block
                    continue
                row[output.name] = torch.as_tensor(value[0])
                if row[output.name].ndim:
                    row[output.name + LENGTH] = torch.tensor(len(value[0]))
        return row

    @contextmanager
    def _as_if_guided(self) -> Iterator[None]:
        """Guidance is on inside the block: Wan's blocks ask for the negative prompt also where nothing reads it."""
        off = [(guider, guider.guidance_scale) for guider in self._guiders() if guider.num_conditions == 1]
        for guider, _ in off:
            guider.enable()
            guider.guidance_scale = 2.0
        yield
        for guider, scale in off:
            guider.guidance_scale = scale
            if scale != 1:
                guider.disable()

    @cached_property
    def _lists(self) -> set[str]:
        """Entries that the blocks keep as a list of one tensor per prompt."""
        outputs = [o for block in self._encoding for o in block.intermediate_outputs]
        return {o.name for o in outputs if "list" in str(o.type_hint).lower()}

    @cached_property
    def _null(self) -> Cond:
        """The conditions of the empty prompt."""
        return stack_rows([self._encode_text("")])

    def unconditional(self, cond: Cond) -> Cond:
        """The empty prompt for every row."""
        size = len(next(iter(cond.values())))
        return {name: value.expand(size, *value.shape[1:]) for name, value in self._null.items()}

    def _rows(self, cond: Cond, own: Tensor) -> dict[str, Any]:
        """Entries for the rows of a batch as the blocks want them."""
        rows: dict[str, Any] = {}
        for name, values in cond.items():
            if name.endswith(LENGTH):
                continue
            values = values.to(self._dtype) if values.is_floating_point() else values
            rows[name] = values[own.to(values.device)].to(own.device)
            if name in self._lists and values.ndim == 1:  # Ideogram's numbers of tokens
                rows[name] = rows[name].tolist()
            elif name in self._lists:
                lengths = cond[name + LENGTH].tolist()
                padded = zip(rows[name], own.tolist(), strict=True)
                rows[name] = [row[: lengths[prompt]] for row, prompt in padded]
        return rows

    def _null_rows(self, size: int) -> dict[str, Any]:
        return self._rows(self._null, torch.zeros(size, dtype=torch.long, device=self.device))

    @torch.no_grad()
    def _prepared(self, rows: Mapping[str, Any], generator: torch.Generator) -> Any:
        """The state in front of the loop, for a batch of rows."""
        state = self._state(**rows, generator=generator, output_type="pt")
        return self._run(self._preparation, state)

    # ---- denoising --------------------------------------------------------------------------------------------

    def schedule(self, num_steps: int) -> list[Level]:
        """The pipeline's own times for its resolution, and the noise levels of its scheduler."""
        self._num_steps = num_steps
        state = self._prepared(self._null_rows(1), _generator(self.device))
        times = state.get("timesteps").double().tolist()
        sigmas = self.blocks.scheduler.sigmas.double().tolist()
        return [Level(1 - s, s, t) for s, t in zip(sigmas, [*times, 0.0], strict=True)]

    def init(self, generator: torch.Generator) -> Tensor:
        """The pipeline's own initial latent for this generator, in the layout of its loop."""
        latent: Tensor = self._prepared(self._null_rows(1), generator).get("latents")[0]
        return latent.float().cpu()

    def predict(self, model: nn.Module, x: Tensor, level: Level, cond: Cond, own: Tensor) -> tuple[Tensor, Tensor]:
        """(x0, eps) from the guided velocity."""
        for network in self._unconditional:
            network.to(x.device)
        state = self._prepared(self._rows(cond, own), _generator(x.device))
        times = state.get("timesteps")
        i = int((times.double() - level.t).abs().argmin())
        t = torch.tensor(level.t, dtype=torch.float32, device=x.device)
        state.set("latents", x.to(self._dtype))
        state.set("timesteps", t[None])  # the loop runs once
        loop, found = copy.copy(self._loop), []

        def predict_only(components: Any, block_state: Any, **_: Any) -> tuple[Any, Any]:
            for block in list(loop.sub_blocks.values())[:-1]:
                inspect.unwrap(type(block).__call__)(block, components, block_state, i=i, t=t)
            found.append(block_state.noise_pred)
            return components, block_state

        loop.loop_step = predict_only
        self._run([loop], state, model)
        return to_x0_eps(x, found[0], level.a, level.s, self.prediction)

    def decode(self, x0: Tensor) -> Tensor:
        """Pictures (N, C, H, W), a few at a time, or films (N, F, C, H, W), one by one, in [0, 1]; gradients flow."""
        at_once = 1 if self._output == "videos" else DECODED_AT_ONCE
        return torch.cat([self._decode(part) for part in x0.split(at_once)])

    def _decode(self, x0: Tensor) -> Tensor:
        self.blocks.vae.to(x0.device)
        state = self._prepared(self._null_rows(len(x0)), _generator(x0.device))
        state.set("latents", x0.to(self.blocks.vae.dtype))
        self._run(self._decoding, state)
        pictures: Tensor = state.get(self._output)
        return pictures.float()


class _Components:
    """The pipeline as its blocks see it, with the denoisers of `model`: the one that trains, or its reference."""

    def __init__(self, adapter: BlocksAdapter, model: nn.Module) -> None:
        inner = bare(unwrap(model))
        self._pipeline = adapter.blocks
        self._execution_device = next(inner.parameters()).device
        for name in adapter.denoisers:
            network = inner.networks[name] if isinstance(inner, Experts) else inner
            setattr(self, name, _Denoiser(network, model, name if isinstance(inner, Experts) else None))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)


class _Denoiser:
    """A denoiser that looks like itself and is called through what wraps it (DDP, PEFT)."""

    def __init__(self, network: nn.Module, wrapped: nn.Module, name: str | None) -> None:
        self._network, self._wrapped, self._name = network, wrapped, name

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._wrapped(*args, **options) if self._name is None else self._wrapped(self._name, *args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)


def _generator(device: torch.device) -> torch.Generator:
    """For latents that are drawn and not used: the global generator stays as it is."""
    return torch.Generator(device)
