"""Small samples of different kinds of text, which every machine has, to measure tokenizers on.

    sample_texts()["code"]      a string
"""
import random
import sysconfig
from pathlib import Path

SAMPLE_CHARACTERS = 300_000
CODE_MODULES = ("argparse", "ast", "dataclasses", "fractions", "heapq", "pathlib", "random", "statistics", "textwrap")

LATIN = """\
Der Zug nach München fährt heute über Nürnberg, weil die Brücke bei Würzburg geschlossen ist. Größere Verspätung ist möglich.
Früh am Morgen hörte sie die Vögel, öffnete das Fenster und wünschte sich, der Frühling würde ein bisschen länger dauern.
L'élève a répété la leçon jusqu'à ce que le maître fût satisfait ; après le dîner, ils ont parlé de l'été et des forêts.
Où est passée la clé du grenier ? Elle était près de la fenêtre, à côté d'un vieux théâtre de papier et d'une boîte à thé.
El niño preguntó por qué el otoño llegó tan pronto. Mañana, si no llueve, iremos a la montaña con más gente y menos equipaje.
A manhã começou com neblina, mas à tarde o avô abriu o portão e as crianças correram até o rio para procurar pedras.
Zażółć gęślą jaźń, mówi stare zdanie ćwiczebne; potem przyszła wiosna i żółte kwiaty zakwitły wzdłuż całej ścieżki.
Příliš tichý večer skončil, když se přihnala bouřka a vítr začal ohýbat staré třešně za humny.
Yağmurlu bir günde küçük kız pencerenin önünde oturdu, çayını içti ve büyükannesinin mektubunu ağır ağır okudu.
Mùa hè năm ấy trời nóng đến nỗi cả làng ra bờ sông ngồi hóng mát, kể chuyện cũ và chờ trăng lên.
På lördag åker vi till sjön, där björkarna står tätt och båtarna ligger förtöjda vid den gamla bryggan.
"""
CYRILLIC_AND_GREEK = """\
Утром над рекой стоял туман, и лодки казались неподвижными, будто кто-то нарисовал их на серой бумаге.
Она открыла книгу на середине, прочитала одну страницу и поняла, что эту историю уже слышала в детстве.
Поезд опоздал на сорок минут; пассажиры пили чай, разговаривали о погоде и смотрели на мокрые огни станции.
Восени діти збирали каштани біля школи, а ввечері їхній дідусь розповідав, як колись будували цей міст.
Следващия ден времето се оправи и цялото семейство тръгна пеша към манастира на хълма.
Το πρωί η θάλασσα ήταν ήρεμη και οι ψαράδες γύριζαν στο λιμάνι με γεμάτα δίχτυα.
Η γιαγιά έκοψε το ψωμί, έβαλε ελιές στο τραπέζι και μας είπε να μη βιαζόμαστε, γιατί ο δρόμος είναι μακρύς.
Ποιος έγραψε αυτό το γράμμα; Κανείς δεν ήξερε, όμως όλοι αναγνώρισαν τον γραφικό χαρακτήρα.
"""
CHINESE_JAPANESE_KOREAN = """\
早上下了一场小雨,街上的人不多,卖豆浆的老板把桌子搬到了屋檐下面。
他在图书馆里找到一本旧地图,上面画着一条已经不存在的河流和几座很小的村庄。
如果明天天气好,我们就去山上看日出;要是下雨,就留在家里包饺子、听音乐。
這個城市的夜市很熱鬧,孩子們拿著燈籠跑來跑去,大人坐在路邊聊天。
朝の電車はいつもより空いていて、窓の外には刈り終えた田んぼがどこまでも続いていた。
祖母は台所でだしを取りながら、若いころに住んでいた港町の話をしてくれた。
コンピューターの電源を入れる前に、ケーブルが正しく接続されているか確かめてください。
비가 그치자 아이들은 운동장으로 뛰어나갔고, 선생님은 창문을 열어 신선한 공기를 들였다.
할아버지께서는 매일 아침 같은 길을 걸으시며 만나는 사람마다 반갑게 인사를 건네신다.
도서관에서 빌린 책을 다 읽지 못해서 반납 날짜를 일주일 더 늦추기로 했다.
"""
ARABIC_HEBREW_HINDI_THAI = """\
في الصباح الباكر فتح الخباز دكانه، وانتشرت رائحة الخبز الطازج في الحارة كلها.
سأل الطفل جدته عن النجوم، فحكت له قصة قديمة عن مسافر ضاع في الصحراء ثم وجد طريقه.
تأخر القطار ساعة كاملة، لكن المسافرين لم يغضبوا لأن الطقس كان جميلاً.
הבוקר ירד גשם קל, והילדים קפצו בין השלוליות בדרך לבית הספר.
סבתא שמרה את כל המכתבים בקופסה ישנה מעץ, ומדי פעם הייתה קוראת לנו אחד מהם בקול רם.
सुबह होते ही गाँव के लोग खेतों की ओर निकल पड़े, क्योंकि बारिश के बाद मिट्टी नरम हो गई थी।
दादी ने बच्चों को एक पुरानी कहानी सुनाई, जिसमें एक चतुर खरगोश शेर को कुएँ तक ले जाता है।
अगर कल बिजली नहीं आई तो हम लालटेन जलाकर पढ़ेंगे और जल्दी सो जाएँगे।
เช้านี้ฝนตกเบา ๆ คนขายขนมย้ายโต๊ะเข้ามาใต้ชายคา แล้วชงชาให้ลูกค้าที่แวะมาหลบฝน
คุณยายเล่าว่าเมื่อก่อนหมู่บ้านนี้ไม่มีถนน ทุกคนต้องพายเรือไปตลาดและกลับบ้านก่อนค่ำ
"""


def sample_texts() -> dict[str, str]:
    """kind of text -> a sample, the same in every call: the reference topics of Python's `help()`, source code of its
    standard library, numbers, and sentences in other scripts."""
    from pydoc_data.topics import topics
    sources = [Path(sysconfig.get_path("stdlib")) / f"{module}.py" for module in CODE_MODULES]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources if path.is_file())
    return {"prose": "\n".join(topics[name] for name in sorted(topics))[:SAMPLE_CHARACTERS],
            "code": code[:SAMPLE_CHARACTERS], "digits": numbers(), "Latin with accents": LATIN,
            "Cyrillic, Greek": CYRILLIC_AND_GREEK, "Chinese, Japanese, Korean": CHINESE_JAPANESE_KOREAN,
            "Arabic, Hebrew, Hindi, Thai": ARABIC_HEBREW_HINDI_THAI}


def numbers() -> str:
    """Lines of dates, times, prices, telephone numbers, measurements, sums and long numbers."""
    rng, lines = random.Random(0), []
    for _ in range(400):
        a, b = rng.randrange(10_000), rng.randrange(10_000)
        lines += [f"{rng.randrange(1900, 2030)}-{rng.randrange(1, 13):02}-{rng.randrange(1, 29):02} "
                  f"{rng.randrange(24):02}:{rng.randrange(60):02}", f"{a} + {b} = {a + b}", f"{a * b}",
                  f"${a / 100:,.2f}", f"+{rng.randrange(1, 99)} {rng.randrange(10**8):08}", f"{rng.gauss(0, 1):.6f}",
                  f"{rng.randrange(10**15)}", f"0x{rng.randrange(16**8):08x}"]
    return "\n".join(lines)
