"""A kernel that does not launch is replaced by plain PyTorch, decided on a trial at the first use of each form."""

import logging

import pytest
import torch

from kernels import absorbed_attention, common, query_attention

MODULES = {"query": query_attention, "absorbed": absorbed_attention}
ONE, MANY = None, torch.tensor([0, 0, 2])


class Kernel:
    """A stand-in for a kernel: counts its launches, or refuses them."""

    def __init__(self, refuses: bool):
        self.refuses, self.launches = refuses, 0

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.launches += 1
            if self.refuses:
                raise common.triton.TritonError("out of resource: shared memory")

        return launch


@pytest.fixture
def kernels(monkeypatch):
    """Make a CPU count as a GPU, with stand-ins for all kernels; `refuse` names those that do not launch."""

    def install(*refuse: str) -> dict[str, Kernel]:
        made = {}
        for form, module in MODULES.items():
            for name in ("_forward_kernel", "_backward_kernel", "_rows_kernel"):
                if hasattr(module, name):
                    made[form + name] = Kernel(form + name in refuse)
                    monkeypatch.setattr(module, name, made[form + name])
        return made

    monkeypatch.setattr(common, "on_gpu", lambda inputs: True)
    for cached in (common._launches, common._warn):
        cached.cache_clear()
    yield install
    for cached in (common._launches, common._warn):
        cached.cache_clear()


def attend(form: str, looks, implementation: str = "auto") -> list[torch.Tensor]:
    """Output and gradients of an operation, compiled or not."""
    torch.manual_seed(0)
    if form == "query":
        leaves = [torch.randn(3, 2, 32), torch.randn(3, 5, 2, 32), torch.randn(3, 5, 2, 32)]
        operation = query_attention.query_attention
    else:
        leaves = [torch.randn(3, 2, 64, dtype=torch.bfloat16), torch.randn(3, 5, 64, dtype=torch.bfloat16)]
        operation = absorbed_attention.absorbed_pooling
    leaves = [leaf.requires_grad_() for leaf in leaves]
    out = operation(*leaves, looks, 0.3, implementation=implementation)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


@pytest.mark.parametrize("looks", [ONE, MANY], ids=["one look", "several"])
@pytest.mark.parametrize(
    ("form", "kernel"),
    [
        (form, name)
        for form in MODULES
        for name in ("_forward_kernel", "_backward_kernel", "_rows_kernel")
        if form == "absorbed" or name != "_rows_kernel"
    ],
)
def test_one_warning_and_plain_pytorch_where_a_kernel_does_not_launch(kernels, caplog, form, kernel, looks):
    made = kernels(form + kernel)
    with caplog.at_level(logging.WARNING, "fovlm"):
        found = [attend(form, looks) for _ in range(2)]
        other = attend(form, MANY if looks is ONE else ONE)
    assert made[form + kernel].launches == 2, "once for each of two forms, never in a step"
    (record,) = caplog.records
    assert "does not launch on cpu" in record.message
    assert "TritonError: out of resource: shared memory" in record.message
    for ours in found:
        torch.testing.assert_close(ours, attend(form, looks, "reference"), rtol=0, atol=0)
    torch.testing.assert_close(other, attend(form, MANY if looks is ONE else ONE, "reference"), rtol=0, atol=0)


@pytest.mark.parametrize("looks", [ONE, MANY], ids=["one look", "several"])
def test_kernels_that_launch_are_used(kernels, caplog, looks):
    made = kernels()
    attend("query", looks)
    trial, trial_backward = 2, 2
    assert made["query_forward_kernel"].launches == trial + 1
    assert made["query_backward_kernel"].launches == trial_backward + 1
    assert not caplog.records


def test_the_decision_holds_while_a_caller_is_compiled(kernels, caplog):
    """No break of the graph, no trial in it, and the shapes of a pack stay variables."""
    kernels("query_forward_kernel")
    graphs = []
    with caplog.at_level(logging.WARNING, "fovlm"):
        compiled = torch.compile(
            lambda *t: query_attention.query_attention(*t, ONE, 0.3),
            dynamic=True, fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph.forward,
        )  # fmt: skip
        for frames in (3, 4):
            query, key = torch.randn(frames, 2, 32), torch.randn(frames, 5, 2, 32)
            want = query_attention.query_attention(query, key, key, ONE, 0.3, implementation="reference")
            torch.testing.assert_close(compiled(query, key, key), want)
    assert (len(graphs), len(caplog.records)) == (1, 1)


def test_the_encoder_keeps_keys_and_values_where_the_absorbed_kernel_does_not_launch(kernels):
    hidden = torch.zeros(2, 5, 64, dtype=torch.bfloat16)
    kernels("absorbed_rows_kernel")
    assert not absorbed_attention.available(hidden)
    common._launches.cache_clear()
    kernels()
    assert absorbed_attention.available(hidden)
