"""Numbers as people write them: thousands, powers of ten, fractions, percent, money and units.

Nothing is evaluated: a number is recognised by its form or it is none, so "9**9**9" costs nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Literal

Outcome = Literal["correct", "incorrect", "undecided"]

MAX_LENGTH = 120
"""Characters; a longer text is no number."""
MAX_EXPONENT = 300
NEAR = Fraction(1, 20)
"""Relative difference past which two numbers are different without a doubt."""
EXACT = Fraction(1, 10**6)
"""Relative difference that conversions and printed floats may leave."""

Dimension = tuple[tuple[str, int], ...]
NO_UNIT: Dimension = ()
PERCENT: Dimension = (("percent", 1),)
DEGREES: Dimension = (("degree", 1),)
TEMPERATURE: Dimension = (("temperature", 1),)
MONEY: tuple[Dimension, ...] = tuple(
    ((currency, 1),) for currency in "dollar euro sterling yen rupee won yuan".split()
)


@dataclass(frozen=True)
class Quantity:
    """A number as it was written, and its unit."""

    value: Fraction
    """As written: 30 for "30 mm"."""
    form: Literal["integer", "decimal", "fraction"]
    digits: int
    """Significant digits as written; 0 for a fraction."""
    decimals: int
    """Digits behind the point, as written; 0 with an exponent or a scale ("1.5 million")."""
    dimension: Dimension = NO_UNIT
    factor: Fraction = Fraction(1)
    offset: Fraction = Fraction(0)
    """In the base unit: value * factor + offset."""
    noun: str = ""
    """A word behind the number that is no known unit: "cats", in lower case."""

    @property
    def base(self) -> Fraction:
        return self.value * self.factor + self.offset


# The number itself. Every repetition is bounded or delimited: no text makes these backtrack far.
_DIGITS = r"(?:\d{1,3}(?:,\d{2,3}){0,12},\d{3}(?!\d)|\d{1,40})(?:\.\d{0,40})?|\.\d{1,40}"
_POWER = r"(?:[eE]([-+]?\d{1,4})|\s?[*x\u00d7]\s?10\s?\^\s?[{(]?\s?([-+]?\s?\d{1,4})\s?[})]?)?"
_DECIMAL = re.compile(rf"([-+]?)\s?({_DIGITS}){_POWER}(?![\d.])")
_TEN = re.compile(r"([-+]?)\s?10\s?\^\s?[{(]?\s?([-+]?\s?\d{1,4})\s?[})]?(?!\d)")
_FRACTION = re.compile(r"([-+]?)\s?(?:(\d{1,15}) )?(\d{1,15})\s?/\s?(\d{1,15})(?![\d./])")
_WHOLE = r"\s?(-?\d{1,15})\s?"
_FRAC = re.compile(
    rf"([-+]?)\s?(\d{{1,15}})?\s?\\[dt]?frac\s?\{{{_WHOLE}\}}\s?\{{\s?(\d{{1,15}})\s?\}}"
)
_MONEY = re.compile(r"([-+]?)\s?(US\s?\$|[$\u20ac\u00a3\u00a5\u20b9\u20a9]|USD|EUR|GBP|JPY|CNY)\s?")
_ABOUT = re.compile(r"(?:about|approximately|approx\.?|around|roughly|exactly|~|\u2248|=)\s?", re.I)
_WORD = re.compile(r"[A-Za-z][A-Za-z'-]{0,30}")

_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_WORDS = {word: number for number, word in enumerate(_SMALL)}
for _n, _ten in enumerate(_TENS, 2):
    _WORDS[_ten] = 10 * _n
    for _i in range(1, 10):
        _WORDS[f"{_ten}-{_SMALL[_i]}"] = _WORDS[f"{_ten} {_SMALL[_i]}"] = 10 * _n + _i
_WORDS_AT_START = re.compile(
    "(?:" + "|".join(sorted(_WORDS, key=len, reverse=True)) + r")(?![A-Za-z-])", re.I
)
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALE = re.compile(r"\s?(hundred|thousand|million|billion|trillion)(?![A-Za-z])", re.I)
_SHORT_SCALES = {"k": 3, "K": 3, "m": 6, "M": 6, "mn": 6, "b": 9, "B": 9, "bn": 9, "T": 12}
_SHORT_SCALE = re.compile(r"\s?(mn|bn|[kKmMbBT])(?![A-Za-z])")

# Dimension, its power, the factor to the base unit, spellings. Case counts ("mW" is no "MW"); a
# spelling that is not here is tried in lower case where that leaves no choice.
_TABLE = """
length 1 1              m meter meters metre metres
length 1 1e-1           dm decimeter decimeters decimetre decimetres
length 1 1e-2           cm centimeter centimeters centimetre centimetres
length 1 1e-3           mm millimeter millimeters millimetre millimetres
length 1 1e-6           \u03bcm um micron microns micrometer micrometers
length 1 1e-9           nm nanometer nanometers
length 1 1000           km kilometer kilometers kilometre kilometres
length 1 1609.344       mi mile miles
length 1 0.0254         in inch inches
length 1 0.3048         ft foot feet
length 1 0.9144         yd yard yards
length 2 10000          ha hectare hectares
length 2 4046.8564224   acre acres
length 3 1e-3           l L liter liters litre litres
length 3 1e-6           ml mL milliliter milliliters millilitre millilitres cc
length 3 0.003785411784 gal gallon gallons
mass 1 1                kg kilogram kilograms
mass 1 1e-3             g gram grams
mass 1 1e-6             mg milligram milligrams
mass 1 1000             t tonne tonnes
mass 1 0.45359237       lb lbs pound pounds
mass 1 0.028349523125   oz ounce ounces
time 1 1                s sec secs second seconds
time 1 1e-3             ms millisecond milliseconds
time 1 60               min mins minute minutes
time 1 3600             h hr hrs hour hours
time 1 86400            d day days
time 1 604800           week weeks
year 1 1                yr yrs year years
year 1 1/12             month months
year 1 10               decade decades
year 1 100              century centuries
percent 1 1             % percent pct
degree 1 1              \u00b0 deg degree degrees
degree 1 57.29577951308232 rad radian radians
energy 1 1              J joule joules
energy 1 1000           kJ
energy 1 4.184          cal
energy 1 4184           kcal
energy 1 3600000        kWh
power 1 1               W watt watts
power 1 1e-3            mW
power 1 1000            kW
power 1 1e6             MW
power 1 1e9             GW
voltage 1 1             V volt volts
voltage 1 1e-3          mV
voltage 1 1000          kV
current 1 1             A amp amps ampere amperes
current 1 1e-3          mA
resistance 1 1          \u03a9 ohm ohms
resistance 1 1000       k\u03a9
force 1 1               N newton newtons
force 1 1000            kN
pressure 1 1            Pa pascal pascals
pressure 1 1000         kPa
pressure 1 100000       bar
pressure 1 101325       atm
frequency 1 1           Hz hertz
frequency 1 1000        kHz
frequency 1 1e6         MHz
frequency 1 1e9         GHz
data 1 1                B byte bytes
data 1 1000             kB KB
data 1 1e6              MB
data 1 1e9              GB
data 1 1e12             TB
amount 1 1              mol mole moles
dollar 1 1              $ US$ USD dollar dollars
dollar 1 1e-2           \u00a2 cent cents
euro 1 1                \u20ac EUR euro euros
sterling 1 1            \u00a3 GBP
yen 1 1                 \u00a5 JPY yen
rupee 1 1               \u20b9 INR rupee rupees
won 1 1                 \u20a9 KRW won
yuan 1 1                CNY RMB yuan
"""
_UNITS: dict[str, tuple[dict[str, int], Fraction]] = {}
_LOWER: dict[str, list[str]] = {}
for _line in _TABLE.strip().splitlines():
    _dimension, _power, _factor, *_names = _line.split()
    for _name in _names:
        _UNITS[_name] = ({_dimension: int(_power)}, Fraction(_factor))
        _LOWER.setdefault(_name.casefold(), []).append(_name)

_TEMPERATURES = {
    "celsius": (Fraction(1), Fraction("273.15")),
    "fahrenheit": (Fraction(5, 9), Fraction("459.67") * Fraction(5, 9)),
    "kelvin": (Fraction(1), Fraction(0)),
}
_TEMPERATURE = re.compile(
    r"(?:\u00b0\s?|deg(?:rees?)?\s)(c|f|celsius|fahrenheit)|(celsius|fahrenheit|kelvins?)", re.I
)
_POWERED = re.compile(
    r"(?:(square|sq\.?|cubic)\s)?([^\s^/\d]{1,20})(?:\^?([23]))?(?: (squared|cubed))?"
)


def _atom(text: str) -> tuple[dict[str, int], Fraction] | None:
    """ "cm^2", "square metre", "h"."""
    found = _POWERED.fullmatch(text)
    if found is None:
        return None
    prefix, name, power, suffix = found.groups()
    if name not in _UNITS:
        spelled = _LOWER.get(name.casefold(), []) if len(name) > 1 else []  # "M" is no metre
        if len({_UNITS[other][1] for other in spelled}) != 1:
            return None
        name = spelled[0]
    powers = [n for n in (
        power and int(power), prefix and (3 if prefix == "cubic" else 2),
        suffix and (3 if suffix == "cubed" else 2),
    ) if n]  # fmt: skip
    if len(powers) > 1:
        return None
    k = powers[0] if powers else 1
    dimensions, factor = _UNITS[name]
    return {key: n * k for key, n in dimensions.items()}, factor**k


@lru_cache(maxsize=1024)
def parse_unit(text: str) -> tuple[Dimension, Fraction, Fraction] | None:
    """Dimension, factor and offset of "km/h", "m^2", "square feet", "degrees Celsius"; None for a
    unit that is not in the table."""
    text = text.strip().rstrip(".")
    temperature = _TEMPERATURE.fullmatch(text)
    if temperature or text == "K":
        name = "kelvin" if temperature is None else (temperature[1] or temperature[2]).casefold()
        name = {"c": "celsius", "f": "fahrenheit", "kelvins": "kelvin"}.get(name, name)
        return TEMPERATURE, *_TEMPERATURES[name]
    if text.casefold() == "mph":
        return (("length", 1), ("time", -1)), Fraction("0.44704"), Fraction(0)
    if text.casefold() in ("kmh", "kph"):
        text = "km/h"
    above, slash, below = text.partition(" per ") if " per " in text else text.partition("/")
    top = _atom(above.strip())
    bottom = _atom(below.strip()) if slash else ({}, Fraction(1))
    if top is None or bottom is None:
        return None
    powers = dict(top[0])
    for key, n in bottom[0].items():
        powers[key] = powers.get(key, 0) - n
    dimension = tuple(sorted((key, n) for key, n in powers.items() if n))
    return dimension, top[1] / bottom[1], Fraction(0)


@dataclass(frozen=True)
class _Number:
    value: Fraction
    form: Literal["integer", "decimal", "fraction"]
    digits: int
    decimals: int
    end: int


def _number(text: str) -> _Number | None:
    """The number at the start of a text."""
    if found := _FRAC.match(text) or _FRACTION.match(text):
        sign, whole, above, below = found.groups()
        if int(below) == 0:
            return None
        value = Fraction(int(above), int(below)) + int(whole or 0)
        return _Number(-value if sign == "-" else value, "fraction", 0, 0, found.end())
    if found := _TEN.match(text):
        exponent = int(found[2].replace(" ", ""))
        if abs(exponent) > MAX_EXPONENT:
            return None
        value = Fraction(10) ** exponent
        value = -value if found[1] == "-" else value
        return _Number(value, "integer" if exponent >= 0 else "decimal", 1, 0, found.end())
    if found := _DECIMAL.match(text):
        sign, digits, power, ten = found.groups()
        exponent = int((power or ten or "0").replace(" ", ""))
        if abs(exponent) > MAX_EXPONENT:
            return None
        plain = digits.replace(",", "")
        whole, point, behind = plain.partition(".")
        value = Fraction((whole or "0") + point + (behind or "0" if point else ""))
        value *= Fraction(10) ** exponent
        integer = value.denominator == 1 and (not behind or exponent >= len(behind))
        return _Number(
            -value if sign == "-" else value,
            "integer" if integer else "decimal",
            len((whole + behind).lstrip("0")),
            0 if exponent else len(behind),
            found.end(),
        )
    if found := _WORDS_AT_START.match(text):
        value = Fraction(_WORDS[found[0].casefold()])
        return _Number(value, "integer", len(str(value)), 0, found.end())
    return None


def parse_quantity(text: str) -> Quantity | None:
    """The quantity that a whole text states, or None where it states anything else.

    The text is one that `verify.clean` has seen: ASCII digits, "-" for every dash, "^" before a
    raised digit. One unknown word may stand behind the number (`noun`).
    """
    if not text or len(text) > MAX_LENGTH:
        return None
    if about := _ABOUT.match(text):
        text = text[about.end() :]
    money = _MONEY.match(text)
    if money:
        text = money[1] + text[money.end() :]
    number = _number(text)
    if number is None:
        return None
    rest = text[number.end :]
    value, decimals = number.value, number.decimals
    scale, table = _SCALE.match(rest), _SCALES
    if scale is None and money:
        scale, table = _SHORT_SCALE.match(rest), _SHORT_SCALES
    elif scale is None and re.match(r"k(?![A-Za-z])", rest):
        scale, table = _SHORT_SCALE.match(rest), _SHORT_SCALES
    form = number.form
    if scale:
        value *= 10 ** table[scale[1] if table is _SHORT_SCALES else scale[1].casefold()]
        rest, decimals = rest[scale.end() :], 0
        form = "integer" if value.denominator == 1 else form
    rest = rest.strip().rstrip(".")
    unit = money[2].replace(" ", "") if money else ""
    if unit and rest:  # "$5 USD" says it twice; anything else behind money is no quantity
        again, first = parse_unit(rest), parse_unit(unit)
        if again is None or first is None or again[0] != first[0]:
            return None
    unit = unit or rest
    if not unit:
        return Quantity(value, form, number.digits, decimals)
    known = parse_unit(unit)
    if known is not None:
        return Quantity(value, form, number.digits, decimals, *known)
    if _WORD.fullmatch(unit):
        return Quantity(value, form, number.digits, decimals, noun=unit.casefold())
    return None


def _rounds_to(value: Fraction, decimals: int, target: Fraction) -> bool:
    """Whether a value, rounded to so many decimals, is the target."""
    if abs(value) > 10**30:
        return False
    exact = Decimal(value.numerator) / Decimal(value.denominator)
    step = Decimal(1).scaleb(-decimals)
    try:
        return Fraction(exact.quantize(step, ROUND_HALF_UP)) == target
    except ArithmeticError:  # more digits than a Decimal holds
        return False


def _close(answer: Quantity, truth: Quantity, rtol: float | None, decimals: int | None) -> Outcome:
    a, t = answer.base, truth.base
    if a == t:
        return "correct"
    if decimals is not None:
        written = (a - truth.offset) / truth.factor
        return "correct" if _rounds_to(written, decimals, truth.value) else "incorrect"
    difference = abs(a - t)
    if rtol is not None:
        return "correct" if difference <= Fraction(rtol) * abs(t) else "incorrect"
    same_unit = answer.factor == truth.factor
    if same_unit and answer.form == truth.form == "integer":
        return "incorrect"
    if difference <= EXACT * abs(t):
        return "correct"
    in_unit = (a - truth.offset) / truth.factor
    if (
        truth.decimals
        and truth.digits >= 3
        and _rounds_to(in_unit, truth.decimals, truth.value)
        # Nor may it be one with fewer digits: "3.14" is not "3.1".
        and (not same_unit or answer.form == "fraction" or answer.decimals >= truth.decimals)
    ):
        return "correct"
    if (
        truth.form == "fraction"
        and same_unit
        and answer.decimals
        and answer.digits >= 3
        and _rounds_to(truth.value, answer.decimals, answer.value)
    ):
        return "correct"
    if difference > max(NEAR * abs(t), Fraction(1, 10**6)):
        return "incorrect"
    return "undecided"


def compare(
    answer: Quantity,
    truth: Quantity,
    *,
    rtol: float | None = None,
    decimals: int | None = None,
    words: Collection[str] = (),
) -> tuple[Outcome, str]:
    """Whether two quantities are the same, and the rule's name.

    Integers must be equal. A decimal number may be given with more digits than the truth has
    (3.14159 for 3.14), a fraction as a decimal of at least three digits. Past a twentieth of the
    truth a number is wrong; in between nobody is sure and the outcome is "undecided". With rtol,
    a relative tolerance, all of this is replaced by |a - t| <= rtol * |t|; with decimals, by: the
    answer, rounded to so many, is the truth.

    The answer may leave out the truth's unit. A unit, or an unknown word ("7 cats"), that the truth
    does not have must be one of `words`, those of the question; else nothing is sure. A currency
    is always welcome. Percent without its sign is a share (0.5) or, above 1, the written number.
    """
    if answer.noun != truth.noun and not {answer.noun, truth.noun} - {""} <= set(words):
        return "undecided", "number.noun"
    if answer.dimension == truth.dimension:
        return _close(answer, truth, rtol, decimals), "number"
    if NO_UNIT in (answer.dimension, truth.dimension):
        return _unit_on_one_side(answer, truth, rtol, decimals, words)
    if {answer.dimension, truth.dimension} == {DEGREES, TEMPERATURE}:
        same = answer.value == truth.value
        return ("correct" if same else "undecided"), "number.degrees"
    # Not "incorrect": a pound, an ounce and a cent are two things each, and a year is 365 days.
    return "undecided", "number.dimension"


def _unit_on_one_side(
    answer: Quantity,
    truth: Quantity,
    rtol: float | None,
    decimals: int | None,
    words: Collection[str],
) -> tuple[Outcome, str]:
    if PERCENT in (answer.dimension, truth.dimension):
        share, whole = (
            q.value / 100 if q.dimension == PERCENT else q.value for q in (answer, truth)
        )
        if abs(share - whole) <= EXACT * abs(whole):
            return "correct", "number.percent"
        if min(abs(answer.value), abs(truth.value)) <= 1:
            return "undecided", "number.percent"
    elif answer.dimension not in (NO_UNIT, *MONEY) and not any(
        parse_unit(word) == (answer.dimension, answer.factor, answer.offset)
        for word in words
        if len(word) > 1 and word != "in"
    ):
        return "undecided", "number.unit_added"
    bare, written = (Quantity(q.value, q.form, q.digits, q.decimals) for q in (answer, truth))
    if _close(bare, written, rtol, decimals) == "correct":
        return "correct", "number.unit_omitted"
    return "undecided", "number.unit_omitted"
