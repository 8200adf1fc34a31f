"""The table of models is what is measured: some families anew, one for each mechanism, and the page as a whole."""

import pytest
import transformers
from models import measure
from models_page import DOCUMENT, RESULTS, is_right, latest_report, page, within_rounding
from table_of_models import check_is_recorded, check_is_whole, is_of_this_version
from tiny_models import families

REPORT = latest_report(RESULTS)
MEASURED = {
    "gpt2": "learned positions",
    "opt": "learned positions with an offset; TRL leaks",
    "bart": "positions counted through the row",
    "bloom": "ALiBi",
    "gemma2": "softcaps and windows",
    "cohere2": "a logit scale, windows, layers without rotary positions",
    "gpt_oss": "sinks and experts; TRL leaks",
    "mixtral": "experts, and the loss of their router",
    "deepseek_v3": "MLA",
    "deepseek_v32": "MLA with an indexer that needs a mask",
    "mamba": "a scan that runs through documents",
    "falcon_h1": "a scan and attention side by side",
    "recurrent_gemma": "a recurrence and windows",
    "stablelm": "arguments that do not reach the attention",
    "llama4_text": "experts whose auxiliary loss never comes",
    "gemma3": "a vision-language model on text",
}


@pytest.mark.parametrize("family", MEASURED)
def test_a_family_measured_anew_is_what_the_table_says(family):
    found = measure(family)
    assert is_right(found)
    check_is_recorded(found, family, REPORT)
    if is_of_this_version(REPORT):
        assert within_rounding(found) == within_rounding(REPORT["families"][family])


@pytest.mark.skipif(
    not is_of_this_version(REPORT), reason=f"the table is not of transformers {transformers.__version__}"
)
def test_every_causal_language_model_of_transformers_is_in_the_table():
    check_is_whole(REPORT, families())


def test_the_page_is_written_from_the_results():
    assert DOCUMENT.read_text(encoding="utf-8") == page(REPORT)
