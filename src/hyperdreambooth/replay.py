"""CUDA graphs: work with static shapes is recorded once and then replayed, so that a GPU doesn't wait for Python.

Work is a function of a dict of tensors that depends on nothing from the host: no random numbers, no tensors made of lists, no
`.item()`. Its first calls run eagerly (the warm-up that CUDA graphs need), the next one is recorded, and the recording is replayed
from then on. What can't be recorded (another shape, too little memory, no CUDA) runs eagerly.

A recording refers to addresses in memory, not to Python objects. So the next training of the same kind and shapes can use it: it
copies its own values into the recorded memory and trains there (`Memory`).
"""

import functools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .progress import say

Inputs = dict[str, Tensor]
Work = Callable[[Inputs], Tensor]
WARM_UP = 2  # Eager calls before a recording: the first ones set up libraries and an optimizer's state.
KEPT = 4  # Recordings that are kept; the least recently used one is dropped first.
OFF = False  # True runs all work eagerly, for comparisons.


class Memory:
    """What a recorded training step reads and writes besides its inputs: a model, and an optimizer's state and learning rates."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.model, self.optimizer = model, optimizer

    def kind(self) -> Hashable:
        """What a recorded step depends on besides its losses: the model's tensors (names, shapes, types) and the optimizer's constants."""
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        shapes = tuple((name, tensor.shape, tensor.dtype, tensor.requires_grad) for name, tensor in tensors.items())
        groups = self.optimizer.param_groups
        constants = tuple((len(group["params"]), group["eps"], group["betas"], group["weight_decay"]) for group in groups)
        return type(self.model), shapes, constants

    def tensors(self) -> dict[str, Tensor]:
        """All these tensors by name; the optimizer's state exists once a step has run."""
        found = {f"model/{n}": t.data for n, t in (*self.model.named_parameters(), *self.model.named_buffers())}
        for index, parameter in enumerate(p for group in self.optimizer.param_groups for p in group["params"]):
            found |= {f"optimizer/{index}/{key}": value for key, value in self.optimizer.state[parameter].items()}
        return found | {f"rate/{index}": group["lr"] for index, group in enumerate(self.optimizer.param_groups)}

    @torch.no_grad()
    def move_to(self, recorded: dict[str, Tensor]) -> None:
        """Copies the present values into the tensors of an earlier recording, which model and optimizer use from then on."""
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            recorded[f"model/{name}"].copy_(tensor)
            tensor.data = recorded[f"model/{name}"]
        for index, parameter in enumerate(p for group in self.optimizer.param_groups for p in group["params"]):
            own = self.optimizer.state[parameter]
            for key in ("step", "exp_avg", "exp_avg_sq"):
                there = recorded.get(f"optimizer/{index}/{key}")
                if there is not None:  # a parameter without a gradient has no state
                    there.copy_(own[key]) if key in own else there.zero_()
                    own[key] = there
        for index, group in enumerate(self.optimizer.param_groups):
            recorded[f"rate/{index}"].copy_(group["lr"])
            group["lr"] = recorded[f"rate/{index}"]


class Recording(NamedTuple):
    """A CUDA graph with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: Inputs
    output: Tensor
    memory: dict[str, Tensor]

    def __call__(self, inputs: Inputs) -> Tensor:
        torch._foreach_copy_(list(self.inputs.values()), list(inputs.values()), non_blocking=True)
        self.graph.replay()
        return self.output


Key = tuple[Hashable, ...]
_recordings: OrderedDict[tuple[Key, Hashable], Recording] = OrderedDict()
_tokens: weakref.WeakKeyDictionary[object, object] = weakref.WeakKeyDictionary()
_say_once = functools.cache(say)


def forget() -> None:
    """Drops all recordings and frees their memory."""
    _recordings.clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def token(owner: object) -> object:
    """Stands for `owner` in a key without keeping it alive. Once it is freed its recordings are dropped, since they refer to its memory."""
    if owner not in _tokens:
        _tokens[owner] = mark = object()

        def drop() -> None:
            for key in [key for key in _recordings if key[0][0] is mark]:
                del _recordings[key]

        weakref.finalize(owner, drop)
    return _tokens[owner]


def fingerprint(model: nn.Module) -> int:
    """Changes with everything of `model` that a recording contains: the addresses of its weights, its PEFT adapters and their scales."""
    found: list[Hashable] = [parameter.data_ptr() for parameter in model.parameters()]
    for path, module in model.named_modules():
        if hasattr(module, "base_layer"):  # wrapped by PEFT
            names = ("active_adapters", "scaling", "disable_adapters", "merged_adapters")
            found.append((path, *(str(getattr(module, name, None)) for name in names)))
    return hash(tuple(found))


class Replayed:
    """`work` as a function that is recorded and replayed where possible. The next call overwrites its output.

    Args:
        key: identifies what the work computes, apart from the shapes of its inputs; equal keys share a recording. It begins with the
            `token` of the object that the work uses besides its inputs and `memory`.
        memory: the model and optimizer that the work changes; None if it changes nothing.
    """

    def __init__(self, work: Work, key: Key, memory: Memory | None = None):
        self.work, self.key, self.memory = work, key, memory
        self.recording: Recording | None = None
        self.signature: Hashable = None
        self.calls, self.given_up = 0, False

    def __call__(self, inputs: Inputs) -> Tensor:
        if self.given_up or OFF or not isinstance(inputs, dict) or not all(value.is_cuda for value in inputs.values()):
            return self.work(inputs)
        signature = tuple((name, value.shape, value.dtype) for name, value in inputs.items())
        if signature != self.signature:
            if self.recording is not None and self.memory is not None:  # rare, such as a smaller last batch
                return self.work(inputs)
            self.signature, self.calls, self.recording = signature, 0, _recordings.get((self.key, signature))
            if self.recording is not None:
                _recordings.move_to_end((self.key, signature))
                if self.memory is not None:
                    self.memory.move_to(self.recording.memory)
        if self.recording is None and self.calls >= WARM_UP:
            self.recording = self._record(inputs)
        self.calls += 1
        if self.recording is not None or self.given_up:
            return (self.recording or self.work)(inputs)
        stream = _side_stream(next(iter(inputs.values())).device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            output = self.work(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return output

    def _record(self, inputs: Inputs) -> Recording | None:
        """Records the work. If that fails, returns None, and the work runs eagerly from then on."""
        while len(_recordings) >= KEPT:
            _recordings.popitem(last=False)
        static = {name: value.clone() for name, value in inputs.items()}
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=_side_stream(next(iter(static.values())).device)):
                output = self.work(static)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            self.given_up = True
            forget()
            why = "memory is short" if isinstance(error, torch.OutOfMemoryError) else str(error).splitlines()[0]
            _say_once(f"not recorded as a CUDA graph ({why}); it goes on step by step, more slowly.")
            return None
        recording = Recording(graph, static, output, self.memory.tensors() if self.memory is not None else {})
        _recordings[self.key, self.signature] = recording
        return recording


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which work is warmed up and recorded, one per device."""
    return torch.cuda.Stream(device)
