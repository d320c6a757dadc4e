"""A line of the log is written once."""

import logging

from proxy.once import Once


def test_each_text_is_logged_once_and_after_so_many_none(caplog):
    tell = Once(logging.getLogger("lopsided.test"), kept=2)
    for text in ("a", "b %s", "a", "c", "b %s"):
        tell(text)
    assert caplog.messages == ["a", "b %s"]
