"""The questionnaire: blind, balanced, self-contained; its answers read back, checked and counted."""

import json
import re

import pytest
import torch

from prefgen.cli import main
from prefgen.errors import ConfigError, DataError
from prefgen.evaluate.answers import Answer, gather, human_figures, read_answers
from prefgen.evaluate.picture_folder import PictureUser, read_picture_folder, save_user_pictures, write_index
from prefgen.evaluate.questionnaire import draw_questions, read_key, write_survey

CONDITIONS = ("own", "base", "other")
PAIRS = [("own", "base"), ("own", "other")]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    users = []
    for i in range(5):
        sets = {
            name: torch.rand(2, 3, 8, 8, generator=generator) for name in (*CONDITIONS, "liked", "disliked")
        }
        files = save_user_pictures(root, name=f"u{i}", sets=sets)
        users.append(
            PictureUser(
                user_id=f"u{i}",
                liked=files["liked"],
                disliked=files["disliked"],
                prompts=("a red fox", '</script> a "boat"'),
                pictures={name: files[name] for name in CONDITIONS},
            )
        )
    write_index(root, users=users, attribution="Made <by> us")
    return root


def draw(pictures, **changes):
    settings = {"pairs": PAIRS, "num_questions": 10, "num_repeats": 3, "seed": 0} | changes
    return draw_questions(read_picture_folder(pictures), **settings)


def answered(survey, choose, *, respondent="p1"):
    return [
        Answer(respondent=respondent, item=q.item, choice=choose(q), left="a", seconds=1.0)
        for q in survey.questions
    ]


def pick_own(question):
    return "a" if question.a == "own" else "b"


def test_questions_are_balanced_and_the_first_condition_is_not_always_a(pictures):
    survey = draw(pictures)
    first = [q for q in survey.questions if not q.repeat_of]
    assert len(first) == 10
    by_pair = [sum({q.a, q.b} == set(pair) for q in first) for pair in PAIRS]
    assert by_pair == [5, 5]
    for pair in PAIRS:
        assert len({q.user for q in first if {q.a, q.b} == set(pair)}) == 5
    assert {q.a == "own" for q in first} == {True, False}
    repeats = {q.repeat_of: q for q in survey.questions if q.repeat_of}
    assert len(repeats) == 3
    for q in first:
        if q.item in repeats:
            assert (repeats[q.item].a, repeats[q.item].b) == (q.b, q.a)
    assert draw(pictures) == survey
    assert draw(pictures, seed=1).survey != survey.survey


def test_the_page_is_blind_and_fetches_nothing(pictures, tmp_path):
    folder = read_picture_folder(pictures)
    survey = draw(pictures)
    places = write_survey(tmp_path, survey=survey, folder=folder, title="Which one?")
    page = places["questionnaire"].read_text(encoding="utf-8")
    content = json.loads(re.search(r"const survey = (.*);\n", page).group(1))
    words = json.dumps({**content, "histories": [], "pictures": []})
    for name in (*CONDITIONS, "u0", "repeat"):
        assert name not in re.sub(r'"late"', "", words), name
    assert "http" not in page
    assert page.count("</script>") == 1  # the prompt's own does not end the script
    assert content["questions"][0]["prompt"] in {"a red fox", '</script> a "boat"'}
    assert all(uri.startswith("data:image/png;base64,") for uri in content["pictures"])
    assert len(content["pictures"]) == len(set(content["pictures"]))
    assert read_key(places["key"]) == survey
    # The key's pictures are the page's: question by question the file of condition a is the one called a.
    import base64
    import io

    from PIL import Image

    users = {user.user_id: user for user in folder.users}
    for q, shown in zip(survey.questions, content["questions"], strict=True):
        data = base64.b64decode(content["pictures"][shown["a"]].split(",")[1])
        file = folder.root / users[q.user].pictures[q.a][q.number]
        assert Image.open(io.BytesIO(data)).tobytes() == Image.open(file).tobytes()


def test_who_always_picks_own_wins_always_and_agrees_with_themselves(pictures):
    survey = draw(pictures)
    answers = [*answered(survey, pick_own), *answered(survey, pick_own, respondent="p2")]
    figures = human_figures(answers, survey=survey, seed=0, num_resamples=100)
    assert figures["pairs"]["own_vs_base"]["mean"] == 1.0
    assert figures["pairs"]["own_vs_base"]["num_users"] == 5
    assert figures["pairs"]["own_vs_base"]["p"] == pytest.approx(2 / 32)
    assert figures["krippendorff_alpha"]["mean"] == pytest.approx(1)
    assert figures["people"]["p1"]["same_again"] == 1.0
    assert figures["num_answers"] == 20
    assert figures["elo"]["own"]["mean"] > figures["elo"]["base"]["mean"]


def test_ties_count_half_and_who_always_presses_left_is_seen(pictures):
    survey = draw(pictures)
    figures = human_figures(answered(survey, lambda q: "tie"), survey=survey, seed=0, num_resamples=100)
    assert figures["pairs"]["own_vs_other"]["mean"] == 0.5
    assert figures["krippendorff_alpha"] is None
    assert figures["left_chosen"] is None
    figures = human_figures(answered(survey, lambda q: "a"), survey=survey, seed=0, num_resamples=100)
    assert figures["people"]["p1"]["left_chosen"] == 1.0
    assert figures["people"]["p1"]["same_again"] == 0.0


def as_json(survey, answers, **changes):
    rows = [{name: getattr(one, name) for name in ("item", "choice", "left", "seconds")} for one in answers]
    record = {"prefgen_answers": 1, "survey": survey.survey, "respondent": "p1", "answers": rows}
    return json.dumps(record | changes)


def test_json_and_csv_of_the_page_say_the_same(pictures, tmp_path):
    survey = draw(pictures)
    answers = answered(survey, pick_own)
    (tmp_path / "a.json").write_text(as_json(survey, answers))
    lines = ["survey,respondent,item,choice,left,seconds"] + [
        f'"{survey.survey}","p1","{one.item}","{one.choice}","{one.left}","{one.seconds}"' for one in answers
    ]
    (tmp_path / "a.csv").write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
    assert read_answers(tmp_path / "a.json", survey=survey) == answers
    assert read_answers(tmp_path / "a.csv", survey=survey) == answers
    with pytest.raises(DataError, match="'p1' has answered in"):
        gather([tmp_path / "a.json", tmp_path / "a.csv"], survey=survey)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "holds no answers of a page"),
        ("item,choice\n", "the first line must be survey,respondent"),
        ("survey,respondent,item,choice,left,seconds\nx,p\n", "line 2: expected 6 columns"),
        ("survey,respondent,item,choice,left,seconds\nx,p,q000,a,a,1\n", "answers questionnaire 'x'"),
        ("survey,respondent,item,choice,left,seconds\n", "holds no answers"),
        ("SURVEY,p,q999,a,a,1", "unknown question 'q999'"),
        ("SURVEY,p,q000,c,a,1", "choice must be a, b or tie"),
        ("SURVEY,p,q000,a,a,fast", "seconds must be a number"),
        ("SURVEY,p,q000,a,a,1\nSURVEY,p,q000,b,a,1", "answers q000 twice"),
    ],
)
def test_answers_that_do_not_fit_are_refused(pictures, tmp_path, text, message):
    survey = draw(pictures)
    if text.startswith("SURVEY"):
        text = "survey,respondent,item,choice,left,seconds\n" + text.replace("SURVEY", survey.survey)
    path = tmp_path / "answers.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=re.escape(message)):
        read_answers(path, survey=survey)


def test_pairs_and_numbers_that_do_not_fit_are_refused(pictures):
    with pytest.raises(ConfigError, match="no pictures of condition 'words'; conditions: own, base, other"):
        draw(pictures, pairs=[("own", "words")])
    with pytest.raises(ConfigError, match="own twice"):
        draw(pictures, pairs=[("own", "own")])
    with pytest.raises(ConfigError, match="at least one question a pair"):
        draw(pictures, num_questions=1)


def test_an_index_that_names_files_elsewhere_is_refused(pictures, tmp_path):
    with pytest.raises(DataError, match="extra.save_pictures=true"):
        read_picture_folder(tmp_path)
    user = PictureUser(user_id="u", liked=("../x.png",), disliked=(), prompts=(), pictures={})
    (tmp_path / "x.png").write_bytes(b"")
    (tmp_path / "in").mkdir()
    write_index(tmp_path / "in", users=[user])
    with pytest.raises(DataError, match=r"no file \.\./x\.png in this folder"):
        read_picture_folder(tmp_path / "in")


def test_as_typed(pictures, tmp_path, capsys):
    out = tmp_path / "survey"
    words = ["evaluate", "humans", "build", "--pictures", str(pictures), "--out", str(out)]
    assert main([*words, "--pairs", "own:base,own:other", "--num-questions", "30"]) == 0
    printed = capsys.readouterr().out
    assert "20 questions and 6 repeats about 5 users" in printed
    assert "the pictures give no more" in printed
    survey = read_key(out / "key.json")
    (tmp_path / "answers.json").write_text(as_json(survey, answered(survey, pick_own)))
    read = ["evaluate", "humans", "read", str(tmp_path / "answers.json"), "--key", str(out / "key.json")]
    assert main([*read, "--json", str(tmp_path / "found.json"), "--num-resamples", "100"]) == 0
    assert "own_vs_base" in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text())["pairs"]["own_vs_other"]["mean"] == 1.0
    assert main([*words, "--pairs", "own-base"]) == 2
    assert "expected first:second" in capsys.readouterr().err
