"""How exactly the ASR behind the verdict *repaired* is known."""

import pytest
from scipy import stats

import compare
from antidote_bench.utils.report import summaries
from tests.test_compare import attack, defense


@pytest.mark.parametrize(("found", "count"), [(45, 450), (0, 50), (50, 50), (900, 9000)])
def test_wilsons_interval_against_scipy(found, count):
    reference = stats.binomtest(found, count).proportion_ci(0.95, "wilson")
    assert summaries.wilson(found / count, count) == pytest.approx(tuple(reference), abs=1e-6)


@pytest.mark.parametrize(("count", "shown"), [(450, True), (999, True), (1000, False), ("", False)])
def test_few_test_images_are_said_to_be_few(tmp_path, capsys, count, shown):
    victim = attack(tmp_path / "a", row={"n_backdoor": count})
    defense(victim, row={"n_backdoor": 9000})
    assert compare.main([str(tmp_path), "--table", "overview"]) == 0
    said = capsys.readouterr().out
    assert ("95 % interval" in said) == shown
    if count == 450:
        assert "on 450 triggered test images, the fewest of a run here" in said
        assert "from 7.6 to 13.1 %" in said
