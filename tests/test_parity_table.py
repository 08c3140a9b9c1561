"""The docs' table of comparisons is the one that the tests' marks give, and no family goes without."""

import parity
from latentgen.models.card import families


def test_the_page_says_what_the_tests_compare():
    assert parity.PAGE.read_text("utf-8") == parity.page(), "run `python tests/parity.py`"


def test_every_family_is_compared():
    compared = parity.marks()
    assert set(compared) == set(families()) - {"glyph"}  # glyph's own tests (test_reference.py) compare it with StableDiffusionPipeline
    for family, by_task in compared.items():
        assert {"encoders", "txt2img", "img2img", "inpaint"} <= set(by_task), family
