"""Steps and passes recorded as CUDA graphs: the GPU starts hundreds of kernels at one command.

Starting the 400 to 1,000 of a step one by one takes a CPU several times longer than they run.
torch.compile, which makes fewer of them, stands here as well.
"""

import contextlib
import logging
import weakref

import torch
from tqdm import tqdm

from experiment.data_parallel import world_size

WARM_UP_STEPS = 3  # in which libraries set themselves up, which cannot be recorded
MOST_SHAPES = 4  # of batches whose passes are kept; each holds the memory of one
PASSES = weakref.WeakKeyDictionary()  # {model: (where its weights lie, the passes there)}


def replayed(step, optimizer):
    """A step(noisy, clean) that is replayed where that works: on a CUDA device, in one process.

    It never waits for the device; between steps, only its optimizer's learning rates may change.
    """
    on_cuda = optimizer.param_groups[0]["params"][0].is_cuda
    return ReplayedStep(step, optimizer) if on_cuda and world_size() == 1 else step


class ReplayedStep:
    """Takes the first steps as they come, records one, and replays it from then on; batches of
    another shape, or all where it cannot be recorded, are left to the step itself.
    """

    def __init__(self, step, optimizer):
        self.step, self.optimizer = step, optimizer
        self.graph, self.shape, self.warm_up = None, None, WARM_UP_STEPS
        self.stream = torch.cuda.Stream()  # a step has to be warmed up where it is recorded

    def __call__(self, noisy, clean):
        self.shape = self.shape or noisy.shape
        if noisy.shape != self.shape or self.warm_up is None:
            return self.step(noisy, clean)
        if self.warm_up:
            self.warm_up -= 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                result = self.step(noisy, clean)
            torch.cuda.current_stream().wait_stream(self.stream)
            return result
        if not self.graph and not self._record(noisy, clean):
            self.warm_up = None
            return self.step(noisy, clean)
        self.noisy.copy_(noisy)
        self.clean.copy_(clean)
        for rate, group in zip(self.rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        self.graph.replay()
        return self.result.clone()

    def _record(self, noisy, clean):
        """Whether the step is in self.graph now. Recording runs nothing."""
        self.noisy, self.clean = noisy.clone(), clean.clone()
        before, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        try:
            with (
                rates_on_device(self.optimizer) as self.rates,
                torch.cuda.graph(graph, stream=self.stream),
            ):
                self.result = self.step(self.noisy, self.clean)
        except Exception as error:  # every layer below has its own exceptions
            torch.cuda.set_stream(before)
            self.optimizer.zero_grad()
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            tqdm.write(f"CUDA graphs do not work here ({why}); going on without them")
            return False
        self.graph = graph
        return True


class ReplayedModel:
    """A model's passes in evaluation mode, replayed on a CUDA device, elsewhere as they come.

    A pass is recorded when a shape of batches comes for the second time; what cannot be recorded is
    left to the model. It stays with the model, for all that replay it, until its weights move to
    other memory or MOST_SHAPES others were used since.
    """

    def __init__(self, model):
        self.model = model
        place = [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]
        if PASSES.get(model, [None])[0] != place:
            PASSES[model] = place, {}
        # By shape, dtype and capacity: the recorded one, None before, False if it fails
        self.passes = PASSES[model][1]

    def __call__(self, noisy):
        """As the model itself; the results are the caller's."""
        if not noisy.is_cuda:
            return self.model(noisy)
        capacity = getattr(self.model, "capacity", None)  # which decides over shapes
        key = (noisy.shape, torch.is_autocast_enabled("cuda"), capacity)
        seen, recorded = key in self.passes, self.passes.pop(key, None)
        if seen and recorded is None:
            recorded = self._record(noisy)
        self.passes[key] = recorded  # the last of the dict is the last that was used
        if len(self.passes) > MOST_SHAPES:
            del self.passes[next(iter(self.passes))]
        if not recorded:
            return self.model(noisy)
        graph, held, (image, routings) = recorded
        held.copy_(noisy)
        graph.replay()
        return image.clone(), [routing.clone() for routing in routings]

    def _record(self, noisy):
        """(graph, its input, its results), or False."""
        held, graph, stream = noisy.clone(), torch.cuda.CUDAGraph(), torch.cuda.Stream()
        before = torch.cuda.current_stream()
        stream.wait_stream(before)
        try:
            with torch.cuda.stream(stream):
                self.model(held)  # where it is recorded, too, libraries set themselves up
            with torch.cuda.graph(graph, stream=stream):
                results = self.model(held)
        except Exception:  # long sequences count ties, for which the CPU has to wait
            torch.cuda.set_stream(before)
            return False
        return graph, held, results


def compiled(model):
    """The model as torch.compile makes it; where that fails, which is said, as it is."""
    torch._dynamo.config.suppress_errors = True
    said = []

    def in_one_sentence(record):  # in place of a traceback for every function of the model
        if not said and record.levelno >= logging.WARNING:
            said.append(print("torch.compile does not work here; going on without it", flush=True))
        return False

    logging.getLogger("torch._dynamo.convert_frame").addFilter(in_one_sentence)
    return torch.compile(model, dynamic=False)


@contextlib.contextmanager
def rates_on_device(optimizer):
    """Within the block, an optimizer reads its learning rates from the tensors that it yields.

    A recorded step has every number of the recording built in; these tensors can be changed.
    """
    groups = optimizer.param_groups
    before = [(group["lr"], group["capturable"]) for group in groups]
    device = groups[0]["params"][0].device
    rates = [torch.tensor(group["lr"], device=device) for group in groups]
    for group, rate in zip(groups, rates, strict=True):
        group |= {"lr": rate, "capturable": True}
    try:
        yield rates
    finally:
        for group, (rate, capturable) in zip(groups, before, strict=True):
            group |= {"lr": rate, "capturable": capturable}
