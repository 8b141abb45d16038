"""A frozen layer with adapters on it: what LoRA-X, FouRA and SVDiff layers have in common."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Name for people → types.
_MATRICES = {"Linear": (nn.Linear,), "Conv1D of transformers": (Conv1D,), "Conv1d, Conv2d, Conv3d": CONVOLUTIONS}


class Buffers(BufferDict):
    """Tensors by adapter's name that are not trained; each is part of the state dict or is not."""

    def put(self, name: str, value: Tensor, *, stored: bool) -> None:
        """Add a tensor, and say whether it is part of the state dict."""
        self.register_buffer(name, value, persistent=stored)

    def __setitem__(self, name: str, value: Tensor) -> None:
        # PEFT sets what it has moved or cast: that doesn't change what is stored.
        self.put(name, value, stored=name in self and name not in self._non_persistent_buffers_set)


class TunedLayer(nn.Module, BaseTunerLayer):
    """A frozen layer, and by adapter's name the tensors that change its weight.

    A subclass names its trained tensors in ``adapter_layer_names``, the others in `buffer_names` and further
    dictionaries by adapter in `noted_names`, gives `check`, `add`, `delta` and `effect`, and may override `adapted` and
    `confirm`. Every adapter's name is a key of `scaling`.

    Attributes:
        key: the module's path in the model, for messages.
        scaling: the strength of each adapter, 1 unless `set_scale` changes it; what the file says is no part of it.
    """

    title: ClassVar[str]
    buffer_names: ClassVar[tuple[str, ...]] = ()
    noted_names: ClassVar[tuple[str, ...]] = ()
    other_param_names: tuple[str, ...] = ("scaling",)

    base_layer: Any
    merged_adapters: list[str]
    if TYPE_CHECKING:
        # PEFT's, which mypy doesn't see behind what torch.nn.Module says of any name.
        adapter_layer_names: tuple[str, ...]
        active_adapters: list[str]
        disable_adapters: bool
        merged: bool
        quantization_backend: Any
        get_base_layer: Callable[[], Any]
        get_base_weight: Callable[[], Tensor]
        set_base_weight: Callable[[Tensor], None]
        set_adapter: Callable[..., None]
        _get_embed_scale: Callable[[], Tensor | None]
        _cast_input_dtype: Callable[[Tensor, torch.dtype], Tensor]
        _get_base_layer_device_and_dtype: Callable[[Any], tuple[torch.device | None, torch.dtype | None]]

    def __init_subclass__(cls) -> None:
        # PEFT deletes what these name with the adapter.
        cls.other_param_names = ("scaling", *cls.buffer_names, *cls.noted_names)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, key: str, **kwargs: Any) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.key = key
        self.scaling: dict[str, float] = {}
        self._disable_adapters = False
        self.merged_adapters = []
        self._active_adapter = adapter_name
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        self.quantization_backend = backend_of(self.get_base_layer(), key, self.title, **kwargs)
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict({}))
        for name in self.buffer_names:
            setattr(self, name, Buffers())

    @classmethod
    def check(cls, base_layer: nn.Module, config: Any, key: str) -> None:
        """Raise a TypeError where the tuner can't change such a layer."""
        raise NotImplementedError

    def add(self, adapter_name: str, config: Any) -> None:
        """Make the tensors of a new adapter."""
        raise NotImplementedError

    def delta(self, names: Sequence[str]) -> Tensor:
        """ΔW of several adapters together, float32, in the stored weight's orientation and shape."""
        raise NotImplementedError

    def effect(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """What several adapters together add to the layer's output."""
        raise NotImplementedError

    def confirm(self, names: Sequence[str]) -> None:
        """Raise a ValueError where what was loaded into adapters doesn't belong to this base."""

    def align(self, names: Sequence[str]) -> None:
        """Make the numbers of several adapters mean the same, their changes kept, before they are added up."""

    def update_layer(self, adapter_name: str, config: Any) -> None:
        """Put a new adapter on the layer.

        Raises:
            ValueError: the layer is merged, so that its weight is no longer the base's.
        """
        if self.merged:
            raise ValueError(f"{self.key}: unmerge {self._listed(self.merged_adapters)} before you add an adapter")
        self.scaling[adapter_name] = 1.0
        try:
            self.add(adapter_name, config)
        except BaseException:
            # A layer that some other adapter lives on must not keep half of a new one.
            del self.scaling[adapter_name]
            raise
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def float_weight(self) -> Tensor:
        """The base's weight as floating-point numbers, dequantised where it must be.

        Raises:
            TypeError: the quantisation has no way back.
            ValueError: the weight has no values.
        """
        if isinstance(self.quantization_backend, ForwardOnlyQuantizationBackend):
            kind = self.quantization_backend.backend_name
            raise TypeError(f"{self.key}: {self.title} needs the weight, and {kind} layers give none back")
        _unpack(self.get_base_layer())
        with torch.no_grad():
            weight: Tensor = self.get_base_weight()
        if weight.device.type == "meta":
            raise ValueError(f"{self.key}: {self.title} needs the weight's values: load the base before the adapter")
        return weight

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Let a ValueError name the module."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{self.key}: {error}") from None

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW of one adapter at its strength, in the stored weight's orientation and shape.

        Raises:
            ValueError: there is no such adapter, or its change is no matrix.
        """
        if adapter not in self.scaling:
            raise ValueError(f"{self.key}: there is no adapter {adapter!r}")
        self.confirm([adapter])
        return self.delta([adapter])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the change of the active adapters, or of those named, to the base's weight.

        Args:
            safe_merge: refuse a result that holds NaN or Inf.
            adapter_names: which; all active ones by default.

        Raises:
            ValueError: the change is no matrix, or a safe merge's result is not finite.
            TypeError: the quantised weight can't be read or written.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) or () if name in self.scaling]
        if not names:
            return
        self.check_mergeable(names)
        self.confirm(names)
        with torch.no_grad():
            step = self.delta([*self.merged_adapters, *names])
            if self.merged_adapters:
                step = step - self.delta(self.merged_adapters)
            self._add_to_weight(step, names, safe=safe_merge)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Take the merged adapters' change off the base's weight again, up to rounding."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        names = [name for name in self.merged_adapters if name in self.scaling]
        with torch.no_grad():
            if names:
                self._add_to_weight(-self.delta(names), names, safe=False)
        self.merged_adapters.clear()

    def check_mergeable(self, names: Sequence[str]) -> None:
        """Raise a ValueError or TypeError where these adapters can't be merged."""
        backend = self.quantization_backend
        if backend is not None and not backend.supports_merge:
            raise TypeError(f"{self.key}: {backend.backend_name} layers can't be merged: their weight can't be changed")

    def _add_to_weight(self, step: Tensor, names: Sequence[str], *, safe: bool) -> None:
        weight = self.float_weight()
        changed = (weight.float() + step.to(weight.device)).to(weight.dtype)
        if safe and not bool(torch.isfinite(changed).all()):
            raise ValueError(f"{self.key}: NaN or Inf in the merged weight: {self._listed(names)} seems to be broken")
        self.set_base_weight(changed)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output with the active adapters, in the dtype that the base layer gives."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [name for name in self.active_adapters if name in self.scaling]
        if self.disable_adapters or self.merged or not names:
            result: Tensor = self.base_layer(x, *args, **kwargs)
            return result
        self.confirm(names)
        return self.adapted(x, names, *args, **kwargs)

    def adapted(self, x: Tensor, names: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output with these adapters."""
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        return result + self.effect(x, names).to(result.dtype)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the strength of an adapter."""
        if adapter in self.scaling:
            self._check_unmerged()
            self.scaling[adapter] = float(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the strength of the active adapters."""
        self._rescale(lambda strength: strength * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the strength of the active adapters by ``scale``, or set it to 1 again."""
        self._rescale(lambda strength: 1.0 if scale is None else strength / scale)

    def _rescale(self, change: Callable[[float], float]) -> None:
        self._check_unmerged()
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = change(self.scaling[name])

    def _check_unmerged(self) -> None:
        # `unmerge` takes off what the strengths say, which must be what was put on.
        if self.merged:
            raise ValueError(f"{self.key}: unmerge {self._listed(self.merged_adapters)} before you change a strength")

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        buffers = [value for name in self.other_param_names if isinstance(value := getattr(self, name), Buffers)]
        held = [dict(buffer.items()).get(adapter_name) for buffer in buffers]
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        target = device or self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        for buffer, value in zip(buffers, held, strict=True):
            # PEFT casts buffers to the base's dtype; these are float32 on purpose.
            if value is not None and target is not None and target.type != "meta":
                buffer[adapter_name] = value.to(target)

    @staticmethod
    def _listed(names: Sequence[str]) -> str:
        return f"the adapter{'s' * (len(names) > 1)} {', '.join(names)}"

    def extra_repr(self) -> str:
        return str(quantization_extra_repr(self))

    def __repr__(self) -> str:
        return f"{self.prefix_name}.{super().__repr__()}"

    @property
    def prefix_name(self) -> str:
        """The tuner's name in `repr`."""
        return self.title.lower().replace("-", "")


def backend_of(base_layer: nn.Module, key: str, title: str, **kwargs: Any) -> Any:
    """How a quantised layer's weight is read and written (PEFT's backends); None where it is not quantised."""
    return resolve_quantization_backend(base_layer, get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass"))


def _unpack(layer: nn.Module) -> None:
    """Undo what a bitsandbytes 4-bit layer does to its weight as it runs on some CPUs: the next run does it again.

    bitsandbytes (0.50.2) reorders the bytes for AVX-512 there, and dequantises them as if it had not.
    """
    weight: Any = getattr(layer, "weight", None)
    if weight is not None and getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(weight.data, weight.quant_state)


def is_conv1d(layer: nn.Module) -> bool:
    """Whether the layer is GPT-2's linear one, whose weight is (in, out)."""
    return isinstance(layer, Conv1D)


def check_layer(layer: nn.Module, key: str, title: str, *, takes: Mapping[str, tuple[type, ...]]) -> None:
    """Make sure that a layer is of a type that a tuner can change.

    Args:
        layer: the base layer.
        key: its path.
        title: of the tuner.
        takes: name for people → types.

    Raises:
        TypeError: it is not, or its module reads the weight past it.
    """
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise TypeError(
            f"{key}: {title} can't change the output of torch.nn.MultiheadAttention, which reads this weight itself"
        )
    if not any(isinstance(layer, types) for types in takes.values()) and not is_quantised(layer, key, title):
        raise TypeError(f"{key}: {title} can't change {type(layer).__name__} layers; it takes {', '.join(takes)}")


def check_matrix_layer(layer: nn.Module, key: str, title: str, *, in_groups: str) -> None:
    """The same for a tuner that takes what has one matrix for a weight.

    Args:
        layer: the base layer.
        key: its path.
        title: of the tuner.
        in_groups: what keeps it from a convolution in groups.

    Raises:
        TypeError: see `check_layer`, or it is a convolution in groups.
    """
    check_layer(layer, key, title, takes=_MATRICES)
    if isinstance(layer, CONVOLUTIONS) and layer.groups > 1:
        raise TypeError(f"{key}: {title} can't change a convolution in groups: {in_groups}")


def is_quantised(layer: nn.Module, key: str, title: str) -> bool:
    """Whether it is a quantised linear layer, whose weight may be packed: into what dtype is no matter of its own."""
    # What torchao quantises stays a torch.nn.Linear: its arguments are not needed to tell the others.
    try:
        return backend_of(layer, key, title) is not None
    except ValueError:
        return True
