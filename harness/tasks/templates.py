"""TRL's chat templates with training marks; apart from the tasks, because `prepare` wants them without paying for a trainer."""


def training_template(tokenizer) -> str | None:
    """TRL's variant, with {% generation %} marks, of the chat template that this tokenizer has; None when TRL knows none."""
    from trl.chat_template_utils import get_training_chat_template

    try:
        return get_training_chat_template(tokenizer)
    except ValueError:
        return None
