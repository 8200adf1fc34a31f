"""Every data set form that TRL takes, in words of the tiny tokenizer, with the options that go with it."""

from datasets import Dataset
from tiny import ROWS, tiny_tokenizer

TEXT = Dataset.from_list([{"text": "tell me a joke no"}, {"text": "what is two plus two four"}] * 3)
PROMPTS = Dataset.from_list(
    [
        {"prompt": "what is the capital of france", "completion": " paris ."},
        {"prompt": "tell me a joke", "completion": " no"},
    ]
    * 3
)
CHATS = Dataset.from_list(
    [
        {
            "messages": [
                {"role": "user", "content": "what is two plus two"},
                {"role": "assistant", "content": "four"},
                {"role": "user", "content": "why"},
                {"role": "assistant", "content": "no"},
            ]
        }
    ]
    * 4
)
CHAT_PROMPTS = Dataset.from_list(
    [
        {
            "prompt": [{"role": "user", "content": "what is two plus two"}],
            "completion": [{"role": "assistant", "content": "four"}],
        }
    ]
    * 4
)
TOKENS = Dataset.from_list(ROWS * 2)

FORMS = {
    "language modelling": (TEXT, {}),
    "prompt and completion": (PROMPTS, {}),
    "prompt and completion, all scored": (PROMPTS, {"completion_only_loss": False}),
    "messages": (CHATS, {}),
    "messages, assistant only": (CHATS, {"assistant_only_loss": True}),
    "conversational prompt and completion": (CHAT_PROMPTS, {}),
    "tokens and labels": (TOKENS, {}),
    "a text field of another name": (TEXT.rename_column("text", "body"), {"dataset_text_field": "body"}),
}

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }} {% endfor %}"
    "{% if flag is defined %}{{ flag }} {% endif %}"
    "{% for message in messages %}{% for key, value in message.items() %}{{ key }} {{ value | tojson }} {% endfor %}"
    "{% endfor %}"
)


def character_tokenizer():
    """Every character that the template may render is a token."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([chr(code) for code in range(33, 127)])
    tokenizer.chat_template = TEMPLATE
    return tokenizer
