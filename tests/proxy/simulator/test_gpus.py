"""The simulated cards: free memory follows what is held."""

from planner.hardware import Gpu, Host, Rig
from proxy.simulator.gpus import SimulatedGpus

CARD = Gpu(uuid="a", name="A", total_bytes=100, free_bytes=90, compute_capability=(8, 6))
RIG = Rig(gpus=(CARD, Gpu(uuid="b", name="B", total_bytes=50, free_bytes=50)), host=Host(total_bytes=7))


def free(gpus):
    return [gpu.free_bytes for gpu in gpus.rig().gpus]


def test_models_and_other_programs_take_memory_and_give_it_back():
    gpus = SimulatedGpus(RIG)
    gpus.hold([30, 0])
    gpus.occupy(0, 20)
    gpus.occupy(1, 5)
    assert free(gpus) == [40, 45]
    gpus.hold([-30, 0])
    gpus.occupy(0, 0)
    assert free(gpus) == [90, 45]


def test_a_card_never_has_less_than_nothing_free():
    gpus = SimulatedGpus(RIG)
    gpus.occupy(1, 60)
    assert free(gpus) == [90, 0]
