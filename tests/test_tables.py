"""Tables for the terminal and for Markdown."""

from fovlm.tables import markdown_table, text_table

ROWS = [["set", "n", "accuracy [95 %]"], ["val/a|b", "12", "50.0 [1.0, 2.0]"], ["x", "3"]]


def test_the_first_column_is_aligned_to_the_left_and_the_others_to_the_right():
    assert text_table(ROWS) == ("set       n  accuracy [95 %]\nval/a|b  12  50.0 [1.0, 2.0]\nx         3")
    assert text_table([["a", "b"], ["cc", "dd"]], left=(0, 1)) == "a   b\ncc  dd"
    assert text_table([["word " * 100]]) == ("word " * 100).strip()  # never wrapped
    assert text_table([]) == ""


def test_markdown_escapes_pipes():
    assert markdown_table(ROWS[:2]) == (
        "| set | n | accuracy [95 %] |\n| --- | ---: | ---: |\n| val/a\\|b | 12 | 50.0 [1.0, 2.0] |"
    )
    assert markdown_table([["a", "b"]], left=(0, 1)) == "| a | b |\n| --- | --- |"
