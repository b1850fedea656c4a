"""A training step as one CUDA graph (graph: true): the GPU gets a step at once, not kernel by kernel."""

import torch
from torch.utils import _pytree as tree

from config import BadInput
from federated import take_step


def graph_steps(device):
    """Return GraphSteps; raises BadInput if the device is no GPU."""
    if device.type != "cuda":
        raise BadInput(f"graph: true needs a GPU, but device is {device.type}; set graph to false")
    return GraphSteps()


class GraphSteps:
    """Takes steps as `take_step` does. Within a local update the first step on batches of one shape is taken
    eagerly, the second is recorded, and from then on the recording is replayed. Local updates share nothing,
    so weights, prototypes and the optimizer's state may be others in each. A method that does not say `graph`
    takes all its steps eagerly. record(step): records a function and returns what runs it."""

    def __init__(self, record=None):
        self.record, self.context, self.recorded = record or cuda_graph, None, {}

    def __call__(self, method, model, optimizer, x, y, context):
        if context is not self.context:
            self.context, self.recorded = context, {}
        key = tuple(x.shape), context.total is None
        if not method.graph or key not in self.recorded:
            self.recorded[key] = None
            return on_side_stream(lambda: in_place(method, model, optimizer, x, y, context), x.device)
        if self.recorded[key] is None:
            self.recorded[key] = self.record_step(method, model, optimizer, x.clone(), y.clone(), context)
        of_x, of_y, terms, replay = self.recorded[key]
        of_x.copy_(x)
        of_y.copy_(y)
        replay()
        return {name: term.clone() for name, term in terms.items()}

    def record_step(self, method, model, optimizer, x, y, context):
        """Return x and y, into which a batch is copied before a replay, the terms it leaves, and replay()."""
        for state in optimizer.state.values():  # Adam counts its steps on the GPU
            state |= {name: value.to(x.device) for name, value in state.items() if name == "step"}
        for group in optimizer.param_groups:
            group |= {name: x.is_cuda for name in group if name == "capturable"}
        terms = {}
        replay = self.record(lambda: terms.update(in_place(method, model, optimizer, x, y, context)))
        return x, y, terms, replay


def in_place(method, model, optimizer, x, y, context):
    """Take a step, after which all that the method had gathered before lies in the same tensors again."""
    before, form = tree.tree_flatten(context.total)
    terms = take_step(method, model, optimizer, x, y, context)
    after = tree.tree_leaves(context.total)
    if len(after) == len(before):  # else it has only begun to gather
        for old, new in zip(before, after):
            if old is not new:
                old.copy_(new)
        context.total = tree.tree_unflatten(before, form)
    return terms


def cuda_graph(step):
    """Record a function's kernels, which are not run, and return the function that runs them."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def on_side_stream(step, device):
    """Return step(), on a GPU run beside the main stream, as CUDA wants it before a recording."""
    if device.type != "cuda":
        return step()
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        result = step()
    torch.cuda.current_stream(device).wait_stream(side)
    return result
