"""Personal data: e-mail addresses, telephone numbers, identity numbers, bank cards and public IP addresses become tags.

`mask` replaces each by one of the fixed tags <EMAIL> <PHONE> <ID> <CARD> <IP>. Fixed, because a stand-in that changes
from match to match would make the output depend on the order of the documents. A number is only taken for what its
checksum allows: a 17-digit order number is no identity number, and of sixteen random digits nine in ten are no card.
Digits that mean nothing without a word (landlines, QQ, WeChat) are only looked for after it.

Names and postal addresses are out of reach of patterns (they need named-entity recognition) and are left.

No pattern starts with \\b: Python's \\w includes Han, so in 联系abc@b.cn谢谢 there is no word boundary to find.
"""
import datetime
import ipaddress
import re

ALONE = r"(?<![0-9A-Za-z$¥￥€£])(?<![0-9][.])"            # no digits cut out of longer ones, of 0.13812345678, A13812345678 or ¥13812345678
END = r"(?![0-9A-Za-z])(?![.][0-9])"

EMAIL = re.compile(r"(?<![A-Za-z0-9_%+-])[A-Za-z0-9_%+][A-Za-z0-9._%+-]{0,63}@(?:[A-Za-z0-9][A-Za-z0-9-]{0,62}\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9@])")
DIGITS = re.compile(r"[0-9][0-9 .()-]{5,}[0-9]")          # the screen: nothing below matches a text without this
RESIDENT = re.compile(ALONE + r"([1-8][0-9]{5})((?:18|19|20)[0-9]{2})([01][0-9])([0-3][0-9])([0-9]{3})([0-9Xx])" + END)
CARD = re.compile(ALONE + r"[2-6](?:[0-9]{15,18}|[0-9]{3}(?:([ -])[0-9]{4})(?:\1[0-9]{4}){2}(?:\1[0-9]{1,3})?)" + END)
SSN = re.compile(r"(?<![0-9A-Za-z.-])(?!000|666|9)[0-9]{3}-(?!00)[0-9]{2}-(?!0000)[0-9]{4}(?![0-9A-Za-z-])")
# Not a quantity: 13812345678元, 15000000000.
MOBILE = re.compile(ALONE + r"(?:\+?86[- ]?)?1[3-9][0-9](?:[- ]?[0-9]{4}){2}(?<!000000)" + END
                    + r"(?! ?(?:[元圆亿吨]|[美日欧港]元|人民币|(?i:yuan|rmb|dollars|usd|euros?|yen|bytes|tons)\b))")
# North America: the area code and the exchange begin with 2 to 9; 300 400 5000 is more often three numbers than one.
NANP = re.compile(ALONE + r"(?:\+?1[-. ]?)?(?:\([2-9][0-9]{2}\) ?[2-9][0-9]{2}[-. ]|[2-9][0-9]{2}([-.])[2-9][0-9]{2}\1)[0-9]{4}" + END)
PHONE_WORD = (r"((?:电话|電話|传真|傳真|座机|热线|熱線|手机|手機|联系方式|拨打|(?i:\btel|\bphone|\bfax|\bcall|\bmobile)\b)[^0-9\n+(]{0,8})")
LANDLINE = re.compile(PHONE_WORD + r"(?:\(?0[0-9]{2,3}\)?[- ]?[2-9][0-9]{2,3}[- ]?[0-9]{4}(?:-[0-9]{1,5})?|[48]00[- ]?[0-9]{3,4}[- ]?[0-9]{3,4}"
                      r"|\+?[0-9]{1,3}[- ][0-9]{2,4}[- ][0-9]{3,4}[- ][0-9]{3,4}|[2-9][0-9]{2}[-. ][0-9]{3}[-. ][0-9]{4})" + END)
# 微信号：zhangsan, 微信：abc_123; not 微信 Windows 版: a colon or 号 must stand between, and without both of them a digit or _ in the name.
WECHAT, WECHAT_ID = "(?:微信|(?i:wechat|weixin))", "(?:号| ?(?i:id))"
ACCOUNT = re.compile(r"((?:(?<![A-Za-z])QQ(?:号码?|群)?|(?:加|扣)[qQ]{2})[：: 号为是]{0,3})[1-9][0-9]{4,10}" + END
                     + rf"|({WECHAT}{WECHAT_ID}[：:] ?|{WECHAT}(?:{WECHAT_ID}[ 为是]{{1,2}}|[：:] ?)(?=[A-Za-z-]+[0-9_]))"
                     + r"[A-Za-z][A-Za-z0-9_-]{5,19}(?![A-Za-z0-9_-])")
NUMBERED = re.compile(r"(?:版本号?|version|section|chapter|[第章节§]) ?\Z", re.I)        # what stands before no address
IPV4 = re.compile(r"(?<![0-9A-Za-z.-])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![0-9A-Za-z])(?![.-][0-9])(?! ?[章节条])")
IPV6 = re.compile(r"(?<![0-9A-Za-z:.])(?:[0-9A-Fa-f]{1,4}:){7}[0-9A-Fa-f]{1,4}(?![0-9A-Za-z:])")


def mod_11_2(number):
    """Is the last of 18 characters the check character of the 17 digits before (ISO 7064, GB 11643)?

    sum a_i * 2^(18-i) = 1 mod 11 over the positions i = 1..18, where X counts 10.
    """
    return sum((10 if c in "Xx" else int(c)) * pow(2, 17 - i, 11) for i, c in enumerate(number)) % 11 == 1


def luhn(number):
    """Do the digits pass Luhn's test (ISO/IEC 7812-1)? From the right, every second digit counts double, digits summed."""
    digits = [int(c) for c in reversed(number) if c.isdigit()]
    return sum(d if i % 2 == 0 else sum(divmod(2 * d, 10)) for i, d in enumerate(digits)) % 10 == 0


def is_date(year, month, day):
    try:
        return bool(datetime.date(int(year), int(month), int(day)))
    except ValueError:
        return False


def is_public(address):
    """A global address: 192.168.0.1, 127.0.0.1 and 300.1.1.1 tell nothing about anybody."""
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False


def mask(text):
    """The text with personal data as tags. Screened first: most documents have neither an @ nor a long digit run."""
    if "@" in text:
        text = EMAIL.sub("<EMAIL>", text)
    if any(word in text for word in ("QQ", "qq", "微信", "echat", "eChat", "eixin")):
        text = ACCOUNT.sub(lambda m: (m[1] or m[2]) + "<ID>", text)
    if DIGITS.search(text):
        text = RESIDENT.sub(lambda m: "<ID>" if is_date(m[2], m[3], m[4]) and mod_11_2(m[0]) else m[0], text)
        text = CARD.sub(lambda m: "<CARD>" if luhn(m[0]) else m[0], text)
        text = SSN.sub("<ID>", text)
        text = NANP.sub("<PHONE>", MOBILE.sub("<PHONE>", text))
        text = LANDLINE.sub(r"\1<PHONE>", text)
        text = IPV4.sub(lambda m: "<IP>" if is_public(m[0]) and not NUMBERED.search(m.string[max(0, m.start() - 9):m.start()]) else m[0], text)
    if text.count(":") >= 7:
        text = IPV6.sub(lambda m: "<IP>" if is_public(m[0]) else m[0], text)
    return text
