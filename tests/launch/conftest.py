"""A fixture of the tests here."""

import pytest

from helpers.launch import Place


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)
