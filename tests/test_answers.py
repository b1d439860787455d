"""Final answers as exact numbers: unequal ones never earn 1, equal ones, written otherwise, earn 1 or are not scored."""

import decimal
import re
import time
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.rollouts import answers
from rlhf.rollouts.reward_functions import numeric_accuracy

decimal.getcontext().prec = 80
NEAR = Decimal(10) ** -40


def earned(answer, solution):
    (reward,) = numeric_accuracy(prompts=[""], completions=[answer], solution=[solution])
    return reward


def check(answer, solution, value, other):
    reward = earned(answer, solution)
    if abs(value - other) <= NEAR * max(abs(value), 1):
        assert reward != 0.0, f"{answer!r} is {solution!r}"
    else:
        assert reward != 1.0, f"{answer!r} is not {solution!r}"


# --- expressions: (text, value, whether it binds as tightly as a number) ------------------------------------------------------


@st.composite
def atoms(draw):
    n = draw(st.integers(1, 30))
    value, kind = Decimal(n), draw(st.integers(0, 7))
    if kind == 0:
        big = draw(st.integers(1000, 2_000_000))
        written = [
            f"{big:,}",
            str(big),
            f"{big:,}".replace(",", "{,}"),
            f"{big:,}".replace(",", "\\,"),
        ]
        return draw(st.sampled_from(written)), Decimal(big), True
    if kind == 1:
        digits = draw(st.sampled_from(["5", "25", "50", "125", "0"]))
        return f"{n}.{digits}", value + Decimal(f"0.{digits}"), True
    if kind == 2:
        below = draw(st.integers(1, 12))
        command = draw(st.sampled_from(["frac", "dfrac", "tfrac"]))
        return f"\\{command}{{{n}}}{{{below}}}", value / below, True
    if kind == 3:
        return (
            draw(st.sampled_from([f"\\sqrt{{{n}}}", f"sqrt({n})", f"√({n})"])),
            value.sqrt(),
            True,
        )
    if kind == 4:
        base, power = draw(st.integers(2, 9)), draw(st.integers(0, 12))
        return (
            draw(st.sampled_from([f"{base}^{{{power}}}", f"{base}^{power}", f"{base}**{power}"])),
            Decimal(base) ** power,
            False,
        )
    if kind == 5:
        base, power = draw(st.integers(2, 9)), draw(st.integers(1, 4))
        return f"{base}^{{-{power}}}", Decimal(base) ** -power, False
    return str(n), value, True


def combined(inner):
    @st.composite
    def one(draw):
        (a, x, tight), (b, y, tight_too) = draw(inner), draw(inner)
        group = lambda text: draw(st.sampled_from([f"({text})", f"\\left({text}\\right)"]))
        sign = draw(st.sampled_from(["+", "-", "*", "/", "frac", "implicit"]))
        space = draw(st.sampled_from(["", " "]))
        if sign == "frac":
            return (f"\\frac{{{a}}}{{{b}}}", x / y, True) if y else (a, x, tight)
        b = b if tight_too and not b.startswith("-") else group(b)
        if sign == "+":
            return f"{a}{space}+{space}{b}", x + y, False
        if sign == "-":
            return f"{a}{space}-{space}{b}", x - y, False
        a = a if tight else group(a)
        if sign == "implicit":
            return f"{a}{group(b)}", x * y, False
        if sign == "*":
            times = draw(st.sampled_from(["*", "\\cdot ", "\\times ", "×"]))
            return f"{a}{space}{times}{space}{b}", x * y, False
        return (f"{a}{space}/{space}{b}", x / y, False) if y else (a, x, tight)

    return one()


EXPRESSIONS = st.recursive(atoms(), combined, max_leaves=4)
WRAPPED = st.sampled_from(
    [
        "{}",
        "\\boxed{{{}}}",
        "so it is $\\boxed{{{}}}$.",
        "#### {}",
        "${}$",
        "x = {}",
        "Hence the answer is {}.",
    ]
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(EXPRESSIONS, EXPRESSIONS, WRAPPED, WRAPPED)
def test_unequal_expressions_never_earn_and_equal_ones_never_lose(a, b, wrap, wrap_too):
    (text, value, _), (other, of_other, _) = a, b
    check(wrap.format(text), wrap_too.format(other), value, of_other)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(EXPRESSIONS, WRAPPED)
def test_no_part_of_an_expression_earns_what_the_whole_does_not(expression, wrap):
    text, value, _ = expression
    for part in set(re.findall(r"\d+(?:\.\d+)?", text)):
        check(wrap.format(text), part, value, Decimal(part))
        check(part, wrap.format(text), Decimal(part), value)
    for written in (str(round(value, 6).normalize()), f"{value:.3e}"):
        check(wrap.format(text), written, value, Decimal(written))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(-60, 60), st.integers(1, 40), st.integers(1, 9))
def test_one_number_in_many_spellings_earns(numerator, denominator, factor):
    value = Fraction(numerator, denominator)
    sign, size = "-" if value < 0 else "", abs(value)
    spellings = [
        f"{sign}\\frac{{{abs(numerator) * factor}}}{{{denominator * factor}}}",
        f"{numerator}/{denominator}",
    ]
    spellings += [
        f"\\dfrac{{{numerator}}}{{{denominator}}}",
        f"({numerator * factor})/({denominator * factor})",
    ]
    whole, rest = divmod(size, 1)
    if whole and rest:
        spellings += [f"{sign}{whole} {rest.numerator}/{rest.denominator}"]
        spellings += [f"{sign}{whole}\\frac{{{rest.numerator}}}{{{rest.denominator}}}"]
    if not 100_000 % denominator:
        spellings += [str(numerator / denominator), f"{numerator / denominator:.5f}"]
    for text in spellings:
        assert earned(f"\\boxed{{{text}}}", spellings[0]) == 1.0, text
        assert earned(f"Thus it is {text}.", spellings[0]) == 1.0, text


EQUAL = [  # also as written by people
    (r"\boxed{2^{10}}", "1024"), ("2**10", "1024"), (r"$2\sqrt{3}$", r"\sqrt{12}"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
    (r"\boxed{\sqrt{16}}", "4"), (r"\sqrt[3]{8}", "2"), (r"\boxed{\frac12}", "0.5"), (r"\boxed{50\%}", "0.5"),
    ("$1,234", "1234"),
    ("18 eggs", "18"), (r"\boxed{18 \text{ cm}}", "18"), (r"90^\circ", "90"), ("90°", "90 degrees"),
    ("2.5 million", "2,500,000"),
    ("3 dozen", "36"), (r"\boxed{x = 7}", "7"), ("2 + 3 = 5", "5"), (r"(1+\sqrt{5})/2", r"\frac{1+\sqrt{5}}{2}"),
    ("1e3", "1000"),
    (r"\left(\frac{2}{3}\right)^2", r"\frac49"), ("-2^2", "-4"), ("$-5$", "-5"), ("**18**", "18"), (r"\boxed{x+1}", "x + 1"),
    ("18", 18), ("18.0", 18), ("It is 18 every day.", "18"), (r"So \(\frac{3}{4}\).", "0.75"), ("$18 a day", "18 dollars"),
    ("A: 5%", r"5\%"), ("it weighs 12kg", "12"), ("0", 0), ("-0", 0), (r"10\,000", "10000"), ("1.5 \\times 10^3", 1500),
]  # fmt: skip
UNEQUAL = [
    (r"\boxed{2\sqrt{3}}", r"5\sqrt{3}"), (r"2\sqrt{3}", "3"), ("3", r"2\sqrt{3}"), ("2x", "2"), ("5x", "5"), (r"2\pi", "2"),
    ("2i", "2"), ("x + 3", "3"), ("so it is x + 3", "3"), ("x^2", "2"), ("x_1", "1"), ("1,2,3", "3"),
    ("(1, 2)", "2"), ("[1, 2]", "2"),
    (r"\{1, 2\}", "2"), ("2 million", "2"), ("3!", "3"), ("2 or 3", "3"), ("2^3^2", "2"), (r"\frac{3}{x}", "3"),
    ("10 mod 3", "3"),
    ("$50", "50 cents"), ("5 km", "5 m"), ("7 squared", "7"), (r"\log 3", "3"), (r"\sqrt{x+2}", "2"), ("f(3)", "3"),
    ("|3|x", "3"),
    (r"x \le 5", "5"), ("x < 5", "5"), ("x ≥ 5", "5"), (r"\boxed{x = 2, y = 3}", "3"), ("1.2.3", "3"), ("3:45", "45"),
    (r"\binom{5}{2}", "2"), ("101_2", "101"), ("0x10", "10"), ("5 \\pm 2", "2"), ("±3", "3"), ("COVID-19", "19"), ("1/0", "0"),
    (r"\overline{3}", "3"), (r"0.\overline{3}", "3"), ("0.333...", "0.333"), ("2^", "2"), ("50%", "0.005"),
    ("½", "2"), ("1½", "1"),
    (r"\sin 30", "30"), ("3 halves", "3"), ("2e", "2"), ("it is 5x", "5"), ("it is 2^x", "2"), ("3^2 x", "9"),
    (r"\boxed{18", "18"),
    ("\\boxed{2+3=6}", "6"), ("3 \\times x", "3"), ("12,34", "34"), ("1 2", "12"), ("1 2", "2"), ("-5", "5"), ("18 - x", "18"),
    ("99999999999999999999.1", "99999999999999999999"), ("2^{0.3}", "2"), ("3 pi", "3"), ("3\\%x", "3"), ("2\\sqrt{3}i", "3"),
    ("infinity", "1"), ("9" * 2000, "9"), ("(2)(x)", "2"), ("3x^2", "2"), ("x=3x", "3"), ("so y = 2x+1", "1"),
    ("it is 4i", "4"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "solution"), EQUAL)
def test_equal_answers_earn(answer, solution):
    assert earned(answer, solution) == 1.0


@pytest.mark.parametrize(("answer", "solution"), UNEQUAL)
def test_unequal_answers_do_not_earn(answer, solution):
    assert earned(answer, solution) in (0.0, None)
    assert earned(solution, answer) in (0.0, None)


@pytest.mark.parametrize("cell", [18, 18.0, "18", Fraction(18), Decimal(18)])
def test_solutions_may_be_numbers(cell):
    assert earned("18", cell) == 1.0
    assert earned("19", cell) == 0.0


@pytest.mark.parametrize("cell", [None, "", float("nan"), "  "])
def test_no_solution_is_not_scored(cell):
    assert earned("18", cell) is None


@pytest.mark.parametrize(
    "piece",
    [
        "(",
        "{",
        "\\sqrt{",
        "\\frac{1}{",
        "2^{",
        "-",
        "1+",
        "9^9^",
        "√",
        "1 ",
        "(2)",
        "\\left(",
        "$",
        "=",
        "x=",
    ],
)
@pytest.mark.parametrize("wrap", ["{}", "\\boxed{{{}}}"])
def test_hostile_expressions_are_read_in_bounded_time(piece, wrap):
    start = time.monotonic()
    for text in (piece * 20_000, piece * 10, piece * 10 + "7" + "})" * 10, piece * 3_000 + "7"):
        earned(wrap.format(text), "7")
    assert time.monotonic() - start < 2
    assert answers.number("9^{9^{9}}") is None
    assert answers.number("(1/3)^{-99999}") is None
    assert answers.number("\\sqrt{" + "9" * 200 + "}") is None
