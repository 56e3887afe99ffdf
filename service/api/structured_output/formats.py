"""The values of `format` that are enforced, as patterns. Any other is a note, as JSON Schema has it.

They take less than their standards where programs that read such texts do: no 29th of February in other years, no leap
seconds, no mailbox in quotes.
"""

from __future__ import annotations

_YEAR = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_LEAP = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP}-02-29)"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_DAY_TIME = "T(?:[0-9]{1,6}H(?:[0-9]{1,6}M(?:[0-9]{1,6}S)?)?|[0-9]{1,6}M(?:[0-9]{1,6}S)?|[0-9]{1,6}S)"
_DURATION = (
    f"P(?:(?:[0-9]{{1,6}}Y(?:[0-9]{{1,6}}M(?:[0-9]{{1,6}}D)?)?|[0-9]{{1,6}}M(?:[0-9]{{1,6}}D)?|[0-9]{{1,6}}D)"
    f"(?:{_DAY_TIME})?|{_DAY_TIME}|[0-9]{{1,6}}W)"
)
_LABEL = "[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_HEX = "[0-9a-fA-F]{1,4}"
_IPV6 = "|".join(
    [f"(?:{_HEX}:){{7}}{_HEX}", f"::(?:(?:{_HEX}:){{0,6}}{_HEX})?", f"(?:{_HEX}:){{1,7}}:"]
    + [f"(?:{_HEX}:){{1,{n}}}:{_HEX}(?::{_HEX}){{0,{6 - n}}}" for n in range(1, 7)]
)
_PATH = r"(?:[a-zA-Z0-9._~!$&'()*+,;=:@/-]|%[0-9a-fA-F]{2})*"

FORMATS = {
    name: f"^(?:{pattern})$"
    for name, pattern in {
        "date": _DATE,
        "time": _TIME,
        "date-time": f"{_DATE}T{_TIME}",
        "duration": _DURATION,
        "email": rf"[a-zA-Z0-9_+-]{{1,32}}(?:\.[a-zA-Z0-9_+-]{{1,31}})?@(?:{_LABEL}\.){{1,2}}[a-zA-Z]{{2,24}}",
        "hostname": rf"{_LABEL}(?:\.{_LABEL}){{0,2}}",
        "ipv4": rf"(?:{_BYTE}\.){{3}}{_BYTE}",
        "ipv6": _IPV6,
        "uuid": "[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}",
        "uri": rf"[a-zA-Z][a-zA-Z0-9+.-]*://(?:{_LABEL}\.)*{_LABEL}(?::[0-9]{{1,4}})?(?:/{_PATH})?(?:\?{_PATH})?(?:#{_PATH})?",
    }.items()
}
