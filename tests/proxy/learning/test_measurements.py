"""What was measured, and its state file: round trips, limits, damage, and two processes that write it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from planner.observation import observe
from planner.placement import Placement, solo
from planner.settings import LoadSettings
from proxy.learning.measurements import ANSWERS_KEPT, FILE_NAME, LEAST_TURNS, PLACEMENTS_KEPT, Measurement, Measurements, Place
from proxy.statefile import StateFile
from tests.planner import models

RIG = models.rig(models.rtx5090(), models.rtx3090())
PROFILE = models.small(n_layers=8)
SPLIT = Placement(layers=(5, 3), order=(1, 0), output_gpu=0)


def measurement(placement=SPLIT, *, num_ctx=4096, speed=50.0, profile=PROFILE):
    observation = observe(
        profile,
        RIG,
        LoadSettings(num_ctx=num_ctx),
        placement,
        context_tokens=1000,
        decode=(100, 100 / speed),
        prompt=(1000, 1.5),
    )
    place = Place.of(profile, RIG, num_ctx, placement)
    return Measurement(place=place, observation=observation, tokens_per_s=speed, turn=(1000.0, 100.0))


def opened(folder):
    return Measurements(StateFile(folder, FILE_NAME))


def test_what_was_measured_outlives_the_process(tmp_path):
    partial = Placement(layers=(4, 0), order=(0,), output_gpu=0, cpu_layers=4, cpu_experts=frozenset({5, 6}))
    before = opened(tmp_path)
    for placement in (SPLIT, solo(1, n_gpus=2, n_layers=8), partial):
        for _ in range(LEAST_TURNS):
            before.add(measurement(placement))
    before.save()
    after = opened(tmp_path)
    place = measurement().place
    assert after.speeds(place) == before.speeds(place) == (50.0,) * LEAST_TURNS
    assert after.calibration(PROFILE, RIG) == before.calibration(PROFILE, RIG)
    assert set(after.calibration(PROFILE, RIG).rates) == {"GPU-RTX 5090", "GPU-RTX 3090", "host"}
    assert after.turn(PROFILE) == before.turn(PROFILE) == (1000.0, 100.0)


def test_two_processes_add_to_one_file(tmp_path):
    # shows: lopsided calibrate beside a running proxy; each sees the other's, neither loses its own
    proxy, command = opened(tmp_path), opened(tmp_path)
    proxy.add(measurement(speed=10.0))
    proxy.save()
    command.add(measurement(speed=20.0))
    command.save()
    proxy.add(measurement(speed=30.0))
    proxy.save()
    assert proxy.speeds(measurement().place) == (10.0, 20.0, 30.0)
    assert command.speeds(measurement().place) == (10.0, 20.0, 30.0)


def test_everything_is_bounded(tmp_path):
    # shows: the last answers of a placement, the placements used last
    kept = opened(tmp_path)
    for speed in range(ANSWERS_KEPT + 5):
        kept.add(measurement(speed=10.0 + speed))
    assert kept.speeds(measurement().place) == tuple(15.0 + speed for speed in range(ANSWERS_KEPT))
    for number in range(PLACEMENTS_KEPT):
        one = measurement(num_ctx=256 * (number + 2))
        kept.add(replace(one, observation=replace(one.observation, run=replace(one.observation.run, model=str(number)))))
    kept.save()
    written = json.loads((tmp_path / FILE_NAME).read_text())
    assert len(written["runs"]) == len(written["speeds"]) == PLACEMENTS_KEPT


@pytest.mark.parametrize(
    "damage",
    [
        lambda value: value | {"runs": None},
        lambda value: value | {"runs": [{"model": 1}]},
        lambda value: value | {"speeds": [value["speeds"][0] | {"tokens_per_s": [-1]}]},
        lambda value: value | {"speeds": [value["speeds"][0] | {"placement": {"layers": [1]}}]},
        lambda value: value | {"runs": [value["runs"][0] | {"answers": [[[1e999], 1, 1, 1, 1]]}]},
        lambda value: value | {"turns": {"x": [[1]]}},
    ],
)
def test_a_damaged_file_is_set_aside(tmp_path, damage):
    before = opened(tmp_path)
    before.add(measurement())
    before.save()
    file = tmp_path / FILE_NAME
    file.write_text(json.dumps(damage(json.loads(file.read_text()))))
    after = opened(tmp_path)
    assert after.speeds(measurement().place) == ()
    assert (tmp_path / (FILE_NAME + ".corrupt")).exists()
    after.add(measurement())
    after.save()
    assert opened(tmp_path).speeds(measurement().place) == (50.0,)


def test_a_file_of_a_later_version_is_left_out_and_no_state_folder_is_fine(tmp_path):
    (tmp_path / FILE_NAME).write_text('{"version": 99}')
    assert opened(tmp_path).speeds(measurement().place) == ()
    nowhere = opened(None)
    nowhere.add(measurement())
    nowhere.save()
    assert nowhere.speeds(measurement().place) == (50.0,)
    assert nowhere.class_rates(RIG)["dense"].rates
    assert not nowhere.class_rates(RIG)["experts"].rates
