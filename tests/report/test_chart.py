"""The picture along depth: one mark a module, or a block where there are too many."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import report_samples as samples

from regraft.report.chart import draw
from regraft.report.depth import after_word, block_of, component_of, further, groups, in_depth_order, left_out, percent


def marks(svg: str) -> int:
    return svg.count('class="mark"')


def test_few_modules_have_a_mark_each() -> None:
    chart = draw(samples.modules(samples.llm()))
    assert marks(chart.svg) == chart.marks == 12
    assert not chart.by_block


def test_many_modules_have_a_mark_for_each_block() -> None:
    names = samples.sd15()
    assert len(names) == 192
    chart = draw(samples.modules(names))
    assert marks(chart.svg) == len(samples.BLOCKS) == 16
    assert chart.by_block
    assert "(12 modules: 12 ported)" in chart.svg


def test_no_module_is_lost_in_grouping() -> None:
    rows = samples.modules(samples.sd15() + samples.llm(80, ("q_proj", "k_proj", "v_proj", "o_proj")) + ["lone"])
    found = groups(rows, 24)
    assert sorted(m.name for g in found for m in g.modules) == sorted(m.name for m in rows)
    assert abs(sum(g.share or 0 for g in found) - 1) < 1e-9


def test_svg_is_well_formed_and_named_for_readers_that_see_no_picture() -> None:
    root = ElementTree.fromstring(draw(samples.modules(samples.sd15()), key="k").svg)
    assert root.attrib["aria-labelledby"] == "k-title k-desc"
    assert root.find("title") is not None
    assert "192 modules in depth order: 180 ported, 12 skipped, 0 refused" in (root.findtext("desc") or "")


def test_names_in_the_picture_are_escaped() -> None:
    svg = draw(samples.modules(["unet.<script>.0.a", "unet.x.1.b"], skip="")).svg
    assert "<script>" not in svg
    assert "&lt;script&gt;" in svg


def test_a_bar_divides_into_kept_cut_and_lost() -> None:
    (module,) = samples.modules(["unet.a.0.to_q"], skip="")
    module = module.model_copy(update={"energy_kept": 0.5, "cut_loss": 0.25})
    heights = dict(
        re.findall(
            r'class="(kept|cut|lost)" x="[\d.]+" y="[\d.]+" width="[\d.]+" height="([\d.]+)"', draw([module]).svg
        )
    )
    assert {name: float(height) for name, height in heights.items()} == {"kept": 60.0, "cut": 30.0, "lost": 30.0}


def test_more_energy_than_came_in_is_marked() -> None:
    (module,) = samples.modules(["unet.a.0.to_q"], skip="")
    assert 'class="over"' in draw([module.model_copy(update={"energy_kept": 1.4})]).svg
    assert 'class="over"' not in draw([module]).svg


def test_a_check_draws_without_energy_and_without_shares() -> None:
    rows = [m.model_copy(update={"share": None}) for m in samples.checked(samples.modules(samples.llm()))]
    assert marks(draw(rows).svg) == 12
    bare = [m.model_copy(update={"similarity": None, "distance": None}) for m in rows]
    assert marks(draw(bare).svg) == 12


def test_blocks_sort_by_number_and_exits_come_last() -> None:
    names = ["model.layers.10.q", "lm_head", "model.layers.9.q", "text_encoder.layers.0.q"]
    ordered = [m.name for m in in_depth_order(samples.modules(names, skip=""))]
    assert ordered == ["model.layers.9.q", "model.layers.10.q", "lm_head", "text_encoder.layers.0.q"]


def test_component_and_block_of_a_name() -> None:
    assert component_of("text_encoder_2.text_model.encoder.layers.0.mlp.fc1") == "text_encoder_2"
    assert component_of("model.layers.0.q_proj") == "model"
    assert block_of("unet.down_blocks.0.attentions.1.proj_in") == "unet.down_blocks.0"
    assert block_of("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0") == "unet.mid_block"
    assert block_of("conv_in") == "conv_in"


def test_what_is_left_out_is_listed_by_reason_heaviest_first() -> None:
    rows = samples.modules(["unet.mid_block.a", "unet.x.0.a", "unet.mid_block.b"])
    rows[1] = rows[1].model_copy(update={"status": "refused", "reason": "other shape", "share": 0.01})
    first, second = left_out(rows)
    assert (first.status, len(first.names)) == ("skipped", 2)
    assert (second.status, second.reason) == ("refused", "other shape")


def test_small_shares_are_not_rounded_to_nothing() -> None:
    assert [percent(v) for v in (None, 0.0, 0.0004, 0.0713, 1.0)] == ["–", "0 %", "<0.1 %", "7.1 %", "100 %"]


def test_the_verdicts_word_and_its_reason_are_not_said_twice() -> None:
    assert after_word("Refused: the weights are unrelated.", "REFUSED") == "The weights are unrelated."
    assert after_word("Part of it survives.", "Needs a refine") == "Part of it survives."
    assert further(["the weights are unrelated", "other"], "Refused: the weights are unrelated.") == ["other"]
