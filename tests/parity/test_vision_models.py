"""The table of vision-language models is what is measured: some families anew, and the page as a whole."""

import pytest
import transformers
from models_page import latest_report
from table_of_models import check_is_recorded, check_is_whole, is_of_this_version
from tiny_vision_models import families
from vision_models import measure
from vision_models_page import DOCUMENT, RESULTS, is_right, page

REPORT = latest_report(RESULTS)
# Of those whose processors need no torchvision
MEASURED = {
    "llava": "the simplest",
    "idefics2": "a processor that cannot plan",
    "aya_vision": "a head that is another one than that of its language model; TRL differs",
    "paligemma": "a prefix whose tokens see each other",
    "ovis2": "a processor that names another token than those of a picture",
    "hunyuan_vl": "a processor that asks for marks around a picture's place",
    "qianfan_ocr": "a place that is another token than those of a picture",
}


@pytest.mark.parametrize("family", MEASURED)
def test_a_family_measured_anew_is_what_the_table_says(family):
    found = measure(family)
    assert is_right(found)
    check_is_recorded(found, family, REPORT, "planned")


@pytest.mark.skipif(
    not is_of_this_version(REPORT), reason=f"the table is not of transformers {transformers.__version__}"
)
def test_every_vision_language_model_of_transformers_is_in_the_table():
    check_is_whole(REPORT, families())


def test_the_page_is_written_from_the_results():
    assert DOCUMENT.read_text(encoding="utf-8") == page(REPORT)
