import numpy as np
import pytest

from prefgen.models.questions import (
    DISLIKED_MARK,
    LIKED_MARK,
    QuestionCounts,
    UserRows,
    draw_item,
    history_pieces,
    parse_attributes,
)
from prefgen.schema import RatedImage, UserHistory

LIKED = ("warm palette", "line art", "dotted")
DISLIKED = ("cold palette", "grid")


def user(num_liked=10, num_disliked=9, first_row=100):
    rng = np.random.default_rng(0)

    def images(count, words):
        return tuple(
            RatedImage(
                image=f"{i}.webp", attributes=("neutral", *rng.permutation(words)[: rng.integers(3)].tolist())
            )
            for i in range(count)
        )

    history = UserHistory(
        user_id="u1",
        source="agent",
        liked=images(num_liked, LIKED),
        disliked=images(num_disliked, DISLIKED),
        liked_attributes=LIKED,
        disliked_attributes=DISLIKED,
    )
    return UserRows(history=history, first_row=first_row)


def draw(seed, *, one=None, liked=(0, 1, 2), disliked=(4, 5), counts=None):
    return draw_item(
        one or user(),
        liked=liked,
        disliked=disliked,
        counts=counts or QuestionCounts(),
        rng=np.random.default_rng(seed),
    )


def rows_of(pieces):
    return [piece for piece in pieces if isinstance(piece, int)]


def test_query_images_are_never_references():
    for seed in range(50):
        item = draw(seed).item
        references = set(rows_of(item.history))
        assert references == {100, 101, 102, 114, 115}
        for question in item.questions:
            assert not references & set(rows_of(question.pieces))


def test_answers_are_true():
    one = user()
    sides = {100 + i: ("liked", image) for i, image in enumerate(one.history.liked)}
    sides |= {110 + i: ("disliked", image) for i, image in enumerate(one.history.disliked)}
    for seed in range(30):
        asked = draw(seed, one=one)
        for kind, question, correct in zip(asked.kinds, asked.item.questions, asked.correct, strict=True):
            rows = rows_of(question.pieces)
            if kind == "like":
                side, image = sides[rows[0]]
                assert question.answer.startswith("Yes" if side == "liked" else "No")
                assert correct == (0 if side == "liked" else 1)
                taste = LIKED if side == "liked" else DISLIKED
                reasons = set(image.attributes) & set(taste)
                said = question.answer.partition("because of the ")[2].rstrip(".")
                assert set(filter(None, said.split(", "))) == reasons
            elif kind == "choose":
                assert sides[rows[correct]][0] == "liked"
                assert sides[rows[1 - correct]][0] == "disliked"
                assert question.answer == ("first", "second")[correct]
            else:
                taste = LIKED if kind == "likes" else DISLIKED
                assert set(parse_attributes(question.answer)) == set(taste)
                assert correct == -1


def test_position_gives_nothing_away():
    """Which side stands first, whether Yes is asked first, and which of two is right: all near one half."""
    asked = [draw(seed) for seed in range(400)]
    first_side = np.mean([a.item.history[0] == LIKED_MARK for a in asked])
    first_yes = np.mean([a.correct[a.kinds.index("like")] == 0 for a in asked])
    first_right = np.mean([a.correct[a.kinds.index("choose")] == 0 for a in asked])
    for share in (first_side, first_yes, first_right):
        assert 0.42 < share < 0.58
    yes = [sum(c == 0 for k, c in zip(a.kinds, a.correct, strict=True) if k == "like") for a in asked]
    assert set(yes) == {3}


def test_a_model_that_sees_everything_but_the_pictures_is_at_chance():
    """Least squares on where a question stands, which side comes first, how many images there are, and which
    of them is asked about; fitted on one half of the draws, right or wrong on the other."""
    rng = np.random.default_rng(1)
    features, answers = [], []
    for seed in range(600):
        liked, disliked = rng.integers(1, 6, 2).tolist()
        references = {"liked": tuple(range(liked)), "disliked": tuple(range(disliked))}
        asked = draw(seed, counts=QuestionCounts(like=4, choose=1, score=2), **references)
        pieces = asked.item.history
        common = [1.0, liked, disliked, liked - disliked, pieces[0] == LIKED_MARK, len(pieces)]
        for place, (kind, correct) in enumerate(zip(asked.kinds, asked.correct, strict=True)):
            if correct >= 0:
                one_hot = [float(place == other) for other in range(len(asked.kinds))]
                features.append([*common, *one_hot, kind == "choose", kind == "score"])
                answers.append(1.0 if correct == 0 else -1.0)
    x, y = np.array(features, dtype=np.float64), np.array(answers)
    half = len(y) // 2
    weights = np.linalg.lstsq(x[:half], y[:half], rcond=None)[0]
    assert 0.46 < np.mean(np.sign(x[half:] @ weights) == y[half:]) < 0.54


def test_score_questions_leave_the_others_as_they_were():
    plain, scored = draw(3), draw(3, counts=QuestionCounts(score=2))
    assert scored.item.questions[: len(plain.kinds)] == plain.item.questions
    assert scored.kinds[len(plain.kinds) :] == ("score", "score")
    for question, correct in zip(scored.item.questions[-2:], scored.correct[-2:], strict=True):
        assert question.answer == ("+", "-")[correct]
        assert (question.pieces[0] < 110) == (correct == 0)


def test_lists_come_in_a_new_order_each_time():
    orders = {draw(seed).item.questions[-2].answer for seed in range(60)}
    assert len(orders) == 6
    cut = draw(0, counts=QuestionCounts(max_listed=2)).item.questions[-2].answer
    assert len(parse_attributes(cut)) == 2


def test_same_generator_same_draw():
    assert draw(7) == draw(7)
    assert draw(7) != draw(8)


@pytest.mark.parametrize("counts", [QuestionCounts(like=5, choose=0, likes=0, dislikes=0)])
def test_scarce_images(counts):
    asked = draw(0, one=user(num_liked=4, num_disliked=2), liked=(0, 1, 2), disliked=(), counts=counts)
    assert len(asked.kinds) == 3
    assert sorted(asked.correct) == [0, 1, 1]


def test_an_empty_side_leaves_its_mark_out():
    assert history_pieces([1, 2], disliked=[]) == [LIKED_MARK, 1, 2]
    assert history_pieces([], disliked=[3]) == [DISLIKED_MARK, 3]
    assert history_pieces([1], disliked=[3], disliked_first=True) == [DISLIKED_MARK, 3, LIKED_MARK, 1]


def test_parse_attributes():
    assert parse_attributes(" warm palette, line art,line art , dotted.") == LIKED
    assert parse_attributes("") == ()
