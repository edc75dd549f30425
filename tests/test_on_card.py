"""What is measured in models stays on a GPU that has values: no tensor of the CPU among its own, no operation that it
lacks."""

import pytest
import torch

from card import CUDA, NOT_DETERMINISTIC, card
from inspection import causes, interventions, lens, outputs, sinks
from inspection.objects import lost
from inspection.outliers import find_threshold, neighbour_cosine
from inspection.statistics import TokenStatistics
from inspection.test_time_registers import rank_neurons
from runs import noise, tiny


def statistics(model, batches):
    found = TokenStatistics(model)
    for images, labels in batches():
        found.add(images, labels)
    found.result()


def artefacts(model, batches):
    find_threshold(model, batches)
    images = torch.cat([images for images, _ in batches()])
    neighbour_cosine(model.patch_embed(images), model.grid_size)


MEASURES = {
    "causes": lambda *on: causes.measure(*on, images=0), "lens": lens.measure, "outputs": outputs.measure,
    "sinks": sinks.measure, "ablations": lambda *on: interventions.ablate(*on, interventions.KINDS),
    "statistics": statistics, "artefacts": artefacts, "register neurons": lambda *on: rank_neurons(*on, 2, 0.1),
}  # fmt: skip


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("lacks", [{}, {"doubles": False, "refused": ["linalg_qr"]}], ids=["cuda", "mps"])
@torch.no_grad()
def test_measures(monkeypatch, name, lacks):
    """On CUDA, and on MPS, which has no float64, and in torch 2.11 no QR."""
    model = tiny(cls_pos=1, reg_pos=2, num_register_tokens=2)
    images, labels = noise(model, 6), torch.arange(6) % 5
    with card(monkeypatch, model, **lacks):
        batches = [(images[n : n + 3].to(CUDA), labels[n : n + 3].to(CUDA)) for n in (0, 3)]
        MEASURES[name](model, lambda: batches)


def test_objects_with_deterministic_kernels(monkeypatch):
    """Sweeps of scenes look for objects after they have trained, perhaps with --deterministic."""
    features = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    expected = lost(features, (4, 6))
    with card(monkeypatch, refused=NOT_DETERMINISTIC):
        assert lost(features.to(CUDA), (4, 6)) == expected


FAULTS = {
    "mixes": (lambda x: x + torch.ones(3), RuntimeError, {}), "array": (lambda x: x.numpy(), TypeError, {}),
    "double": (lambda x: x.double(), TypeError, {"doubles": False}),
    "refused": (lambda x: x.kthvalue(1), RuntimeError, {"refused": NOT_DETERMINISTIC}),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_raise(monkeypatch, fault):
    does, error, how = FAULTS[fault]
    with card(monkeypatch, **how):
        x = torch.arange(3.0).to(CUDA)
        assert (x * 2).cpu().tolist() == [0, 2, 4] and x.device == CUDA
        with pytest.raises(error):
            does(x)
