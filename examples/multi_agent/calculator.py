"""The math agent's tool: exact arithmetic with sympy, for expressions that a model wrote.

sympy's own parsers (`sympify`, `parse_expr`) run `eval` on what they are given. Here Python's `ast` parses, and only
what is listed below becomes a sympy object; the bounds keep `9**9**9**9` from running for ever.
"""

import ast
import operator
from collections.abc import Callable
from fractions import Fraction

import sympy

_LONGEST_EXPRESSION = 200
_MOST_BITS = 4_000
_LARGEST_EXPONENT = 1_000
_LARGEST_VALUE = sympy.Integer(10) ** 500
_DIGITS = 12

_CONSTANTS: dict[str, sympy.Expr] = {"pi": sympy.pi, "e": sympy.E}
_SIGNS: dict[type[ast.unaryop], Callable[[sympy.Expr], sympy.Expr]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_OPERATORS: dict[type[ast.operator], Callable[[sympy.Expr, sympy.Expr], sympy.Expr]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_FUNCTIONS: dict[str, Callable[[sympy.Expr], sympy.Expr]] = {
    "sqrt": sympy.sqrt,
    "sin": sympy.sin,
    "cos": sympy.cos,
    "tan": sympy.tan,
    "exp": sympy.exp,
    "log": sympy.log,
    "abs": sympy.Abs,
}


class CalculatorError(ValueError):
    """The expression cannot be computed; the message is written for the model that wrote it."""


def calculate(expression: str) -> str:
    """Compute an arithmetic expression.

    Args:
        expression: Numbers, + - * / // % **, parentheses, pi, e, and sqrt, sin, cos, tan, exp, log, abs.

    Returns:
        The exact value, and its decimals where it is not a whole number: "1/3 ≈ 0.333333333333".

    Raises:
        CalculatorError: It is something else, too large, or has no real value.
    """
    if len(expression) > _LONGEST_EXPRESSION:
        raise CalculatorError(f"the expression is longer than {_LONGEST_EXPRESSION} characters")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise CalculatorError("this is not an arithmetic expression in Python's notation") from error
    try:
        value = _value(tree.body)
    except ZeroDivisionError as error:
        raise CalculatorError("a division by zero") from error
    if value.is_Integer:
        return str(value)
    return f"{value} ≈ {sympy.sstr(value.evalf(_DIGITS), full_prec=False)}"


def _value(node: ast.expr) -> sympy.Expr:
    """Compute the node, and refuse a value that the next step could choke on."""
    value = _computed(node)
    if value.has(sympy.nan, sympy.zoo):
        raise ZeroDivisionError
    if _bits(value) > _MOST_BITS:
        raise CalculatorError("the exact value is too long")
    approximate = value.evalf(_DIGITS)
    if not approximate.is_extended_real:
        raise CalculatorError("the value is not a real number")
    if abs(approximate) > _LARGEST_VALUE:
        raise CalculatorError("the value is too large")
    return value


def _computed(node: ast.expr) -> sympy.Expr:
    match node:
        # A float's repr is what was written: 0.1 is one tenth here. bool is an int, and no number here.
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return _number(number)
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.UnaryOp(op=sign, operand=operand) if type(sign) in _SIGNS:
            return _SIGNS[type(sign)](_value(operand))
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left), _value(right))
        case ast.BinOp(left=left, op=between, right=right) if type(between) in _OPERATORS:
            return _OPERATORS[type(between)](_value(left), _value(right))
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](_value(argument))
    allowed = ", ".join([*_CONSTANTS, *_FUNCTIONS])
    raise CalculatorError(f"'{ast.unparse(node)}' is not allowed: only numbers, + - * / // % **, {allowed}")


def _number(number: float) -> sympy.Expr:
    try:
        exact = Fraction(repr(number))
    except ValueError as error:
        raise CalculatorError("a number is too large") from error
    return sympy.Rational(exact.numerator, exact.denominator)


def _power(base: sympy.Expr, exponent: sympy.Expr) -> sympy.Expr:
    size = abs(exponent.evalf(_DIGITS))
    if size > _LARGEST_EXPONENT or _bits(base) * size > _MOST_BITS:
        raise CalculatorError("the power is too large")
    return base**exponent


def _bits(value: sympy.Expr) -> int:
    """How many bits the numbers in an expression take together."""
    return sum(number.p.bit_length() + number.q.bit_length() for number in value.atoms(sympy.Rational))
