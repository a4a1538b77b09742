"""The frozen target: a Hugging Face causal LM whose layers are tapped, and whose embedding and head the drafter uses."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import nn
from torch.distributed import get_world_size
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from specauf import assets
from specauf.anatomy import body_of, decoder_layers, reach_of, softcap_of
from specauf.config import EMBEDDED, TargetConfig
from specauf.files import at_home
from specauf.objective.wavefront import Head
from specauf.strict import ConfigError, UserError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class Tapped(NamedTuple):
    features: Float[Tensor, "b s taps_h"]
    """Outputs of the tapped layers, concatenated in the order of the ids; layer l is `hidden_states[l + 1]`."""
    final: Float[Tensor, "b s h"]
    """The body's output after the final norm: what the LM head reads."""


UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError),
    *(ImportError, RuntimeError, SafetensorError, StrictDataclassError),
)
"""What transformers raises for a directory or a hub id that it cannot load."""


def _path(config: TargetConfig) -> str:
    """What transformers loads. Raises `UserError` on a directory that does not exist."""
    if config.path == EMBEDDED:
        return str(assets.smollm2())
    local = at_home(config.path)
    if config.path.startswith(("/", "./", "../", "~")) and not local.is_dir():
        raise UserError(f"target.path: no such directory: {config.path}")
    return str(local) if local.is_dir() else config.path


def _why(config: TargetConfig, error: Exception) -> str:
    on_hub = isinstance(error, OSError) and not Path(_path(config)).is_dir()
    told = assets.unreached(error) if on_hub else str(error)
    return told.partition("\nModel type should be one of")[0]  # all that it can be, two hundred


def load_tokenizer(config: TargetConfig) -> PreTrainedTokenizerBase:
    """The target's tokenizer without its weights. Raises `UserError` as `Target.load` does."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            _path(config),
            trust_remote_code=config.trust_remote_code,
            local_files_only=assets.offline(),
            mistral_format=False,  # with vLLM comes mistral-common, whose tokenizer has neither template nor offsets
        )
    except UNREADABLE as error:
        raise UserError(f"target.path: cannot load the tokenizer of {config.path!r}: {_why(config, error)}") from error


class Target:
    """A frozen causal LM. Nothing here is trained, copied or saved with a drafter."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, name: str) -> None:
        self.model, self.tokenizer, self.name = model.eval().requires_grad_(False), tokenizer, name
        self.body: nn.Module = body_of(model, name)
        self.layers: nn.ModuleList = decoder_layers(model, self.body)
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        if head is None or embedding is None:
            raise UserError(f"{name}: this model has no LM head or no input embedding; specauf needs a causal LM")
        self.head_weight: Tensor = head.get_parameter("weight")
        self.head_bias: Tensor | None = getattr(head, "bias", None)
        self.embed_weight: Tensor = embedding.get_parameter("weight")
        widths = (self.embed_weight.shape[1], self.head_weight.shape[1], model.config.hidden_size)
        if len(set(widths)) > 1:
            raise UserError(
                f"{name}: embedding, LM head and layers are {widths[0]}, {widths[1]} and {widths[2]} wide; a block drafter "
                "shares all three and needs one width"
            )
        if getattr(model.config, "tie_word_embeddings", False) and head.weight is not embedding.weight:
            raise UserError(f"{name}: the config ties embedding and head, but the loaded weights are not tied")
        self.softcap = softcap_of(model.config)
        self.reach = reach_of(model.config, self.body, embedding)
        """How many positions text may take; None where more are no error."""
        self._warned = False
        # Renamed in transformers 5.24. A model without the old name would not refuse it: it would decode without its cache.
        renamed = "cache" in inspect.signature(self.body.forward).parameters
        self._cache_argument = "cache" if renamed else "past_key_values"

    @classmethod
    def load(cls, config: TargetConfig, to_shard: bool = False) -> Target:
        """Load a directory, a hub id or the embedded default. Raises `UserError` saying what is wrong with the path.

        With `to_shard` the decoder layers stay in host memory, and how the target computes is checked by `shard`.
        """
        from transformers import AutoModelForCausalLM

        path = _path(config)
        device = config.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            why = str(error).partition("\n")[0]
            raise UserError(
                f"target.device: {device!r} cannot be used here ({why}): try cpu, cuda, cuda:1, mps or auto"
            ) from None
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=getattr(torch, config.dtype),
                trust_remote_code=config.trust_remote_code,
                local_files_only=assets.offline(),
                output_loading_info=True,
            )
        except UNREADABLE as error:
            raise UserError(
                f"target.path: cannot load {config.path!r} as a causal LM: {_why(config, error)}"
            ) from error
        model, told = loaded
        if missing := sorted(told["missing_keys"]):  # transformers draws them at random, and only warns
            raise UserError(
                f"target.path: {config.path!r} lacks {len(missing)} of the model's tensors ({', '.join(missing[:3])}, ...): "
                "its weights are incomplete, or of another architecture than its config.json says"
            )
        tokenizer = load_tokenizer(config)
        if to_shard:
            layers = set(decoder_layers(model, body_of(model, config.path)).modules())
            for module in model.modules():
                if module not in layers:
                    module._apply(lambda t: t.to(device), recurse=False)
        else:
            try:
                model = model.to(device)
            except torch.OutOfMemoryError as error:
                remedy = "set a target.dtype of 16 bits, or train on several GPUs with train.shard_target=true"
                raise UserError(f"target.path: {config.path!r} does not fit on {device} ({error}): {remedy}") from None
        target = cls(model, tokenizer, config.path)
        rows, most = target.embed_weight.shape[0], max(tokenizer.get_vocab().values(), default=0)
        if most >= rows:
            log.warning(
                "%s: the tokenizer has ids up to %d and the embedding %d rows: text with the others cannot be read",
                *(config.path, most, rows),
            )
        if not to_shard:
            target.require_own_logits()
            target.require_causal()
        return target

    @torch.no_grad()
    def require_own_logits(self) -> None:
        """Raise `UserError` when the model computes its logits otherwise than `logits` does: some scale them, say."""
        # Many tokens: a row of the embedding that is zero (a pad token's) makes zero logits, at any scale.
        ids = torch.linspace(0, self.embed_weight.shape[0] - 1, 16, device=self.device).long()[None]
        theirs = self.model(input_ids=ids, use_cache=False).logits.float()
        ours = self.logits(self.run(ids).final).float()
        if float((theirs - ours).abs().max()) > 0.03 * float(theirs.abs().max()):  # bfloat16 rounds to 0.004
            raise UserError(
                f"{self.name}: {type(self.model).__name__} does more to its logits than an LM head, a bias and a soft cap "
                "(a scale, perhaps); specauf would decode and train on another distribution"
            )

    @torch.no_grad()
    def require_causal(self) -> None:
        """Raise `UserError` when a token sees later ones: its features would tell a drafter what it is to predict."""
        ids = torch.linspace(0, self.embed_weight.shape[0] - 1, 16, device=self.device).long()[None]
        other = torch.cat([ids[:, :8], ids[:, 8:].flip(1)], 1)
        one, two = (self.logits(self.run(row).final[0, :8]) for row in (ids, other))
        moved = (one - two).abs().amax(-1) > 0.01 * one.abs().max()
        if moved.sum() > 4:  # one or two may be near ties of a router
            raise UserError(f"{self.name}: in {type(self.model).__name__} a token sees later ones here: no causal LM")

    @property
    def device(self) -> torch.device:
        return self.embed_weight.device

    @property
    def display_name(self) -> str:
        """The name for reports; the embedded default's says that its weights were quantised to 4 bits."""
        return assets.SMOLLM2_NAME if self.name == EMBEDDED else self.name

    @property
    def source(self) -> str:
        """What loads it again: its name, or the whole path of a directory, which is found from any other."""
        local = self.name != EMBEDDED and Path(self.name).is_dir()
        return str(Path(self.name).resolve()) if local else self.name

    @property
    def config(self) -> Any:
        return self.model.config

    def require_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer. Raises `UserError` when there is none."""
        if self.tokenizer is None:
            raise UserError(f"{self.name} has no tokenizer")
        return self.tokenizer

    def embed(self, ids: Int[Tensor, ...]) -> Float[Tensor, "... h"]:
        return F.embedding(ids, self.embed_weight)

    @property
    def head(self) -> Head:
        return Head(self.head_weight, self.head_bias, self.softcap)

    def logits(self, hidden: Float[Tensor, "... h"]) -> Float[Tensor, "... v"]:
        """LM head on final hidden states, as float32 (float64 stays)."""
        return self.head.read(hidden)

    @contextmanager
    def tap(self, layer_ids: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """While open, every forward puts the outputs of the given layers into the returned dict."""
        taps: dict[int, Tensor] = {}

        def keep(layer_id: int) -> Any:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                taps[layer_id] = output[0] if isinstance(output, (tuple, list)) else output

            return hook

        handles = [self.layers[i].register_forward_hook(keep(i)) for i in layer_ids]
        try:
            yield taps
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def run(
        self,
        input_ids: Int[Tensor, "b s"],
        layer_ids: Sequence[int] = (),
        *,
        attention_mask: Bool[Tensor, "b kv"] | Bool[Tensor, "b 1 s kv"] | None = None,
        position_ids: Int[Tensor, "b s"] | None = None,
        cache: Any = None,
    ) -> Tapped:
        """The body alone, no head. Rows padded on the right need no attention mask: attention is causal.

        With `cache` (a Hugging Face cache), `input_ids` continue it, and `attention_mask` covers cache and input. A mask
        with four dimensions replaces causality and says who sees whom (True is seen); raises `UserError` when the target's
        attention cannot take it.
        """
        if cache is None:
            self.require_reach(input_ids.shape[1], "shorten the text, or lower data.max_length")
        if self.num_layers - 1 in layer_ids:
            raise ConfigError(f"layer {self.num_layers - 1} is the last; its hidden state is only known after the norm")
        if attention_mask is not None and attention_mask.ndim == 4:
            if self.config._attn_implementation not in ("sdpa", "eager"):
                raise UserError(f"attention {self.config._attn_implementation!r} takes no tree mask: use sdpa or eager")
            dtype = self.embed_weight.dtype
            attention_mask = (~attention_mask).to(dtype) * torch.finfo(dtype).min  # both add it to the scores
        with self.tap(layer_ids) as taps:
            out = self.body(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=cache is not None,
                **{self._cache_argument: cache},
            )
        final: Tensor = out.last_hidden_state
        if any(tap.shape != final.shape for tap in taps.values()):  # Gemma 3n's put out four, stacked before the batch
            raise UserError(f"{self.name}: layers of {type(self.body).__name__} put out more than a state per token")
        features = torch.cat([taps[i] for i in layer_ids], -1) if layer_ids else final[..., :0]
        return Tapped(features, final)

    def require_reach(self, positions: int, remedy: str) -> None:
        """Raise `UserError` when `positions` are more than the target has, or has without changing its earlier ones."""
        if self.reach is not None and positions > self.reach:
            raise UserError(f"{self.name} reaches {self.reach} positions here, and this takes {positions}: {remedy}")
        known = getattr(self.config, "max_position_embeddings", None) or positions
        if positions > known and not self._warned:
            self._warned = True
            log.warning(
                "%s was made for %d positions, and this takes up to %d: beyond those its text may be poor",
                *(self.name, known, positions),
            )

    def shard(self) -> None:
        """Spread the decoder layers over the processes of the default group (FSDP2); embedding, norm and head stay whole.

        Layer by layer each process moves one to its device and keeps its part of it, so that the whole need fit on none. A
        layer's weights are gathered when it runs and dropped after, so every process has to run it the same number of times
        from here on. Raises `UserError` as `load` does.
        """
        self.fingerprint()  # now, while weights are whole
        mesh = init_device_mesh(self.device.type, (get_world_size(),))
        for layer in self.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        # With a root of their own above them, a layer's weights are gathered while the layer before it computes.
        within = {id(p) for p in self.layers.parameters()}
        rest = {p for p in self.body.parameters() if id(p) not in within}
        fully_shard(self.body, mesh=mesh, ignored_params=rest)
        self.require_own_logits()
        self.require_causal()

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def final_norm(self) -> nn.Module:
        """What normalises the last layer's output before the LM head reads it. Raises `UserError` where none is found."""
        found = [m for m in self.body.children() if "norm" in type(m).__name__.lower()]
        if not found:
            raise UserError(f"{self.name}: no norm beside the decoder layers of {type(self.body).__name__}")
        return found[-1]

    def fingerprint(self) -> str:
        """Twelve hex digits of configuration, tokenizer, template and a strided sample of every weight.

        Computed once, at the first call: a target is frozen, and one that `shard` has split can no longer be sampled.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        config = {k: v for k, v in self.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
        if self.tokenizer is not None:
            backend = getattr(self.tokenizer, "backend_tokenizer", None)
            if backend is not None and (backend.truncation or backend.padding):  # the first call would reset them
                backend = Tokenizer.from_str(backend.to_str())
                backend.no_truncation()
                backend.no_padding()
            digest.update((backend.to_str() if backend is not None else str(self.tokenizer.get_vocab())).encode())
            digest.update(self._templates().encode())
        for name, tensor in self.model.state_dict().items():
            flat = tensor.detach().flatten()
            sample = flat[:: max(1, flat.numel() // 4096)].float().cpu()
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode() + sample.numpy().tobytes())
        return digest.hexdigest()[:12]

    def _templates(self) -> str:
        """The text of the tokenizer's chat template, or of its several named ones."""
        template = getattr(self.tokenizer, "chat_template", None) or ""
        return template if isinstance(template, str) else json.dumps(template, sort_keys=True)

    def eos_ids(self) -> frozenset[int]:
        """Every id that ends a generation: the generation config's, the model config's and the tokenizer's."""
        found: set[int] = set()
        generation = getattr(self.model, "generation_config", None)
        for source in (generation, self.config, self.tokenizer):
            value = getattr(source, "eos_token_id", None)
            found.update(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
        return frozenset(found)

    def mask_token_id(self, explicit: int | None = None) -> int:
        """An embedding row that text never uses: the given one, the tokenizer's mask token, the first row beyond the
        tokenizer in a padded table, or the highest special token that neither the template nor generation uses."""
        vocab, tokenizer = self.embed_weight.shape[0], self.tokenizer
        if explicit is not None:
            if not 0 <= explicit < vocab:
                raise ConfigError(f"drafter.mask_token_id {explicit} is not a row of the embedding ({vocab} rows)")
            return explicit
        if tokenizer is None:
            raise ConfigError(
                "drafter.mask_token_id must be given: this target has no tokenizer to find an unused row in"
            )
        if tokenizer.mask_token_id is not None:
            return int(tokenizer.mask_token_id)
        beyond = max(tokenizer.get_vocab().values()) + 1  # more than their number where ids have gaps
        if beyond < vocab:
            return beyond
        named = {getattr(tokenizer, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad", "unk")} | self.eos_ids()
        free = [
            i
            for i, token in tokenizer.added_tokens_decoder.items()
            if token.special and i not in named and token.content not in self._templates()
        ]
        if not free:
            raise ConfigError(
                "no unused embedding row found for MASK: give drafter.mask_token_id a row that text never uses"
            )
        return max(free)
