"""The public names of the planner, so that a change of them is seen."""

import planner


def test_the_public_names_are_these_and_exist() -> None:
    """``__all__`` is sorted, complete, and every name in it is there."""
    assert planner.__all__ == [
        "Calibration",
        "Candidate",
        "DeviceMemory",
        "Gpu",
        "Host",
        "LoadSettings",
        "MemoryEstimate",
        "ModelProfile",
        "Placement",
        "Plan",
        "PlanRequest",
        "Rig",
        "build_profile",
        "estimate_memory",
        "make_plan",
    ]
    assert all(hasattr(planner, name) for name in planner.__all__)
