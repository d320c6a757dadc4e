"""A stand-in Ollama of both eras with simulated GPUs: what ``lopsided demo`` runs and what the tests run against.

It answers as the recordings of Ollama 0.24.0 and 0.32.15 do, places models by stock's rules (``planner.stock``) on the cards
of a ``Rig``, and answers at the speed that the placement implies (``planner.speed``). There is no model behind it: its words
are made up, and everything that it shows to a person says that it is simulated.
"""

from proxy.simulator.gpus import SimulatedGpus
from proxy.simulator.models import demo_models
from proxy.simulator.server import create_app
from proxy.simulator.simulation import Simulator
from proxy.simulator.store import Model, Store, build_model

__all__ = ["Model", "SimulatedGpus", "Simulator", "Store", "build_model", "create_app", "demo_models"]
