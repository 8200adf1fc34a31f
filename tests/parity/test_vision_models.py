"""The table of vision-language models is what is measured: some families anew, and the page as a whole."""

import pytest
import transformers
import trl
from models_page import latest_report
from tiny_vision_models import families
from vision_models import measure
from vision_models_page import DOCUMENT, RESULTS, is_right, page

REPORT = latest_report(RESULTS)
SAME_VERSION = REPORT["versions"]["transformers"] == transformers.__version__
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
    found, recorded = measure(family), REPORT["families"][family]
    assert is_right(found)
    if not SAME_VERSION:  # another release of transformers may take another way
        return
    kept = ("way", "why_padded", "head", "why_compact", "attention", "attention_calls", "planned")
    assert {key: found["packsft"][key] for key in kept} == {key: recorded["packsft"][key] for key in kept}
    if trl.__version__ == REPORT["versions"]["trl"]:
        assert found["trl"]["verdict"] == recorded["trl"]["verdict"]


@pytest.mark.skipif(not SAME_VERSION, reason=f"the table is not of transformers {transformers.__version__}")
def test_every_vision_language_model_of_transformers_is_in_the_table():
    assert list(REPORT["families"]) == families()
    assert all(result.get("error") != "" for result in REPORT["families"].values())  # left out only with a reason


def test_the_page_is_written_from_the_results():
    assert DOCUMENT.read_text(encoding="utf-8") == page(REPORT)
