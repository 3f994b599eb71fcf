"""The page of generated responses says what was measured, and escapes what was generated."""

from __future__ import annotations

from emoscale.evaluation.generation_page import response_sections


def arm(value: float, **more: dict) -> dict:
    one = {"value": value, "low": value - 0.1, "high": value + 0.1}
    measures = {name: dict(one) for name in ("perplexity", "bleu", "similarity", "emotion_consistency")}
    for name in more:
        measures[name]["difference"] = more[name]
    samples = [{"id": "a#0001", "said": "we go", "generated": "<b>home</b>"}]
    return measures | {"dist_1": 0.25, "dist_2": 0.5, "unigram": 99.4, "uniform": 30522.0, "samples": samples}


def test_a_row_per_arm_with_its_difference() -> None:
    gap = {"value": 0.2, "low": -0.05, "high": 0.4}
    result = {"arms": {"full": arm(0.6), "blind": arm(0.4, emotion_consistency=gap)}, "responses": 349, "said": 0.888, "judge": "runs/judge"}
    table, samples = response_sections(result, command="emoscale evaluate model=full")
    assert "60.0 (50.0 … 70.0)" in table.html
    assert "40.0 (30.0 … 50.0) [+20.0 (-5.0 … +40.0)]" in table.html
    assert "99.4" in table.html
    assert table.html.count("30,522") == 2
    assert any("349 held-out responses" in note and "88.8 of the true ones" in note and "full less this row" in note for note in table.notes)
    assert samples.html.count("&lt;b&gt;home&lt;/b&gt;") == 2
    assert "<b>home" not in samples.html
