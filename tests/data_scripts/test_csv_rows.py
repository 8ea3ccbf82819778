import pytest

from data_scripts.csv_rows import read_csv_rows
from data_scripts.row_checks import RowError


REQUIRED = ("path", "caption")


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def test_rows_are_read_as_texts(tmp_path):
    text = '\ufeffpath, caption ,note\r\na.jpg,"a man, walking",x\r\n\r\n"b ""2"".jpg",人 ,\r\nc.jpg\r\n'
    assert list(read_csv_rows(write(tmp_path / "a.csv", text), REQUIRED)) == [
        {"path": "a.jpg", "caption": "a man, walking", "note": "x"},
        {"path": 'b "2".jpg', "caption": "人"},
        {"path": "c.jpg"},
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "caption is missing, got an empty file"),
        ("path;caption\na;b\n", "path, caption is missing, got path;caption"),
        ('path,caption\na,"b', "row 0 .*unexpected end of data"),
    ],
)
def test_what_is_no_csv_is_told(tmp_path, text, problem):
    path = write(tmp_path / "a.csv", text)
    with pytest.raises(ValueError, match=f"{path}: .*{problem}"):
        list(read_csv_rows(path, REQUIRED))


def test_a_row_of_too_many_cells_is_an_error_of_its_own(tmp_path):
    path = write(tmp_path / "a.csv", "path,caption\na,b\na,b,c\nd,e\n")
    first, error, last = read_csv_rows(path, REQUIRED)
    assert isinstance(error, RowError) and "expected 2 cells, got 3" in str(error)
    assert [first, last] == [{"path": "a", "caption": "b"}, {"path": "d", "caption": "e"}]


def test_another_encoding_is_told(tmp_path):
    path = write(tmp_path / "a.csv", "path,caption\na,é\n", "latin-1")
    with pytest.raises(ValueError, match="it is not UTF-8"):
        list(read_csv_rows(path, REQUIRED))
