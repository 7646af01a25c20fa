"""Single attentions that several tests share."""
