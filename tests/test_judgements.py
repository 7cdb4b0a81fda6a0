import pytest

from prefgen.errors import DataError
from prefgen.judgements import read_judge_file, write_judge_file


def test_the_template_is_read_back_filled_in(tmp_path):
    path = tmp_path / "judge.csv"
    write_judge_file(path, images=["image-000.png", "image-001.png", "base-000.png", "base-001.png"])
    text = path.read_text()
    assert text.splitlines() == [
        "image,liked", "image-000.png,", "image-001.png,", "base-000.png,", "base-001.png,"
    ]  # fmt: skip
    path.write_text(
        text.replace("image-000.png,", "image-000.png,Yes").replace("base-001.png,", "base-001.png, 0 ")
    )
    found = read_judge_file(path)
    assert found.liked == (tmp_path / "image-000.png",)
    assert found.disliked == (tmp_path / "base-001.png",)


def test_what_spreadsheets_make_of_it(tmp_path):
    path = tmp_path / "judge.csv"
    path.write_bytes("\ufeffImage;Liked\r\na.png;no\r\n\r\nb.png;TRUE\r\n".encode())
    found = read_judge_file(path)
    assert found.liked == (tmp_path / "b.png",)
    assert found.disliked == (tmp_path / "a.png",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the first line must be image,liked, got ''"),
        (b"picture,liked\n", "the first line must be image,liked, got 'picture,liked'"),
        (b"image,liked\na.png,\n", "no image was judged; write yes or no"),
        (b"image,liked\na.png,maybe\n", "line 2: liked must be yes, no or empty, got 'maybe'"),
        (b"image,liked\na.png,yes,no\n", "line 2: expected image,liked, got 3 columns"),
        (b"image,liked\na.png,\n../b.png,yes\n", r"line 3: image must be the name of a file beside it"),
        (b"image,liked\na.png,yes\na.png,no\n", "line 3: a.png was judged before"),
        (b"\xff\xfe", "is not text in UTF-8"),
    ],
)
def test_files_that_say_something_else_are_one_line(tmp_path, content, message):
    path = tmp_path / "judge.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_judge_file(path)
    assert "\n" not in str(caught.value)


def test_no_file(tmp_path):
    with pytest.raises(DataError, match="cannot read .*: No such file"):
        read_judge_file(tmp_path / "judge.csv")
