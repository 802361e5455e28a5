"""What customers of a small electronics shop write: the phrase banks of the demo's support tickets.

The labelling rules follow from these banks alone: the problem phrase names the team, the cue the priority
(no cue: normal), the product word the product (none: null), the order number the order (none: null).
"""

from __future__ import annotations

TEAMS = ("billing", "shipping", "technical", "account", "sales")
PRIORITIES = ("high", "normal", "low")

# The label, then the words customers use for it; every English problem phrase may take any of them.
PRODUCTS = {
    "router": ("router", "Wi-Fi router", "mesh router"),
    "camera": ("camera", "security camera"),
    "printer": ("printer", "laser printer"),
    "headset": ("headset", "wireless headset"),
    "laptop": ("laptop", "notebook"),
    "tablet": ("tablet",),
    "speaker": ("speaker", "smart speaker"),
    "monitor": ("monitor", "4K monitor"),
    "keyboard": ("keyboard",),
    "charger": ("charger", "USB-C charger"),
    "doorbell": ("doorbell", "video doorbell"),
    "thermostat": ("thermostat",),
}

PROBLEMS = {
    "billing": (
        "I was charged twice for the {product}",
        "the invoice for my {product} shows the wrong amount",
        "I still haven't got the refund for the {product} I sent back",
        "my card was billed for a {product} I cancelled",
        "the discount was not taken off the bill for the {product}",
        "you took a payment for the {product} that I don't recognise",
        "I see two payments on my bank statement",
        "the refund you promised never reached my bank",
    ),
    "shipping": (
        "the {product} has not arrived yet",
        "the courier left the {product} at the wrong house",
        "the box with the {product} came crushed",
        "the parcel with my {product} is marked delivered but I don't have it",
        "can you change the delivery address for the {product}",
        "the shipment of the {product} came back to you as undeliverable",
        "my parcel is lost somewhere",
        "the driver never showed up with my package",
    ),
    "technical": (
        "the {product} won't turn on",
        "my {product} keeps disconnecting",
        "the {product} shows error {code}",
        "the firmware update on the {product} failed",
        "the {product} gets very hot and shuts down",
        "my {product} freezes after a few minutes",
        "the {product} does not pair with my phone",
        "the {product} crashes every time I start it",
    ),
    "account": (
        "I can't log in to register my {product}",
        "the password reset mail never comes, so I can't set up my {product}",
        "please move the {product} to my other account",
        "I want to change the e-mail address on my account",
        "my account was locked after three tries",
        "the two-factor code is not accepted when I sign in",
        "please delete my account and all my data",
        "I forgot my password and the reset link is dead",
    ),
    "sales": (
        "do you have the {product} in stock in black",
        "is there a discount if I buy ten of the {product}",
        "I would like a quote for a {product}",
        "will the price of the {product} drop soon",
        "can I trade in my old {product} for a new one",
        "does the {product} come with a longer warranty if I pay more",
        "I want to buy a {product} as a gift, what do you offer",
        "do you sell to schools at a better price",
    ),
}

CUES = {
    "high": (
        "This is urgent!",
        "I need this solved today.",
        "Please fix this ASAP.",
        "Our whole office is waiting on this.",
        "This can't wait any longer.",
        "I need an answer within the hour.",
        "We lose money every minute.",
    ),
    "normal": ("",),
    "low": (
        "No rush at all.",
        "Whenever you have time.",
        "Just a minor thing.",
        "Take your time.",
        "Any time this month is fine.",
        "No hurry from my side.",
        "Low priority for me.",
    ),
}

GREETINGS = ("", "", "Hi,", "Hello,", "Hey there,", "Dear support,", "Good morning,", "Hi team,", "Hello again,")
FILLERS = (
    "", "", "", "",
    "I bought it last month.", "I already tried the help page.", "My husband says hi.",
    "I'm a customer since 2019.", "Love the new website by the way.", "I wrote to you last week too.",
    "The weather here is awful.", "Your colleague on the phone was very kind.", "I attach a photo.",
)  # fmt: skip
CLOSINGS = ("", "", "", "Thanks", "Thank you!", "Best regards", "Cheers", "Kind regards", "Thanks in advance")
NAMES = (
    "Maria", "Tom", "Aisha", "Jürgen", "Chloé", "Ravi", "Olga", "Kenji", "Sofía", "Liam", "Zoë", "Ahmed",
    "Ingrid", "Paul", "Mei", "Nkechi", "André", "Björn", "Lucía", "Grace",
)  # fmt: skip
COMPANIES = ("Hillside Dental", "Café Noir", "Brightwater Ltd", "Müller & Söhne", "Oak Street School", "Nordlys AS")
ORDER_MENTIONS = (
    "Order {order}.", "Order number {order}.", "My order is {order}.", "(order {order})", "Ref {order}.",
    "Order no. {order}.", "It's order {order}.", "Order: {order}.",
)  # fmt: skip
QUOTED = (
    "> On Monday support wrote:\n> Please give us more details.",
    "> We got your message and will reply soon.",
    "> Is there anything else we can do for you?",
)

# Messages in other languages: language, then problem phrases, cues and product words of the same labels.
FOREIGN_PROBLEMS = {
    "es": {
        "billing": ("me han cobrado dos veces {product}", "la factura de {product} está mal"),
        "shipping": ("todavía no ha llegado {product}", "el paquete con {product} se ha perdido"),
        "technical": ("no se enciende {product}", "se apaga sola la conexión de {product}"),
        "account": ("no puedo entrar en mi cuenta", "mi cuenta está bloqueada"),
        "sales": ("¿hay descuento para {product}?", "quiero comprar {product}"),
    },
    "de": {
        "billing": ("mir wurde {product} doppelt berechnet", "die Rechnung für {product} ist falsch"),
        "shipping": ("{product} ist noch nicht angekommen", "das Paket mit {product} ist verloren gegangen"),
        "technical": ("{product} geht nicht an", "{product} stürzt ständig ab"),
        "account": ("ich kann mich nicht in mein Konto einloggen", "mein Konto ist gesperrt"),
        "sales": ("gibt es Rabatt auf {product}?", "ich möchte {product} kaufen"),
    },
    "fr": {
        "billing": ("on m'a facturé deux fois {product}", "la facture pour {product} est fausse"),
        "shipping": ("{product} n'est pas encore arrivé", "le colis avec {product} est perdu"),
        "technical": ("{product} ne s'allume pas", "{product} plante tout le temps"),
        "account": ("je n'arrive pas à me connecter à mon compte", "mon compte est bloqué"),
        "sales": ("y a-t-il une remise sur {product} ?", "je veux acheter {product}"),
    },
    "zh": {
        "billing": ("{product}被重复扣款了", "{product}的发票金额不对"),
        "shipping": ("{product}还没有收到", "{product}的包裹丢了"),
        "technical": ("{product}无法开机", "{product}总是断线"),
        "account": ("我无法登录账户", "我的账户被锁定了"),
        "sales": ("{product}有折扣吗", "我想购买{product}"),
    },
}
FOREIGN_CUES = {
    "es": {"high": "¡Es urgente!", "normal": "", "low": "No hay prisa."},
    "de": {"high": "Es ist dringend!", "normal": "", "low": "Es eilt nicht."},
    "fr": {"high": "C'est urgent !", "normal": "", "low": "Rien ne presse."},
    "zh": {"high": "非常紧急！", "normal": "", "low": "不着急。"},
}
FOREIGN_PRODUCTS = {
    "es": {"router": "el router", "tablet": "la tablet", "printer": "la impresora", "camera": "la cámara"},
    "de": {"router": "der Router", "tablet": "das Tablet", "printer": "der Drucker", "camera": "die Kamera"},
    "fr": {"router": "le routeur", "tablet": "la tablette", "printer": "l'imprimante", "camera": "la caméra"},
    "zh": {"router": "路由器", "tablet": "平板电脑", "printer": "打印机", "camera": "摄像头"},
}
FOREIGN_ORDER = {
    "es": "Pedido {order}.",
    "de": "Bestellung {order}.",
    "fr": "Commande {order}.",
    "zh": "订单 {order}。",
}

# Help-desk prose for a domain-pretraining stage.
HANDBOOK = {
    "billing": "The billing team looks into double charges, wrong invoices, missing refunds and unknown fees",
    "shipping": "The shipping team traces lost parcels, wrong addresses, crushed boxes and missing deliveries",
    "technical": "The technical team helps with devices that do not start, lose the connection, overheat or crash",
    "account": "The account team handles logins, passwords, locked accounts, profile changes and deletions",
    "sales": "The sales team answers questions on stock, prices, quotes, discounts and trade-ins",
}
ADVICE = {
    "billing": (
        "Compare the amount on the {product} invoice with the bank statement before a refund is started.",
        "A second payment for one {product} is usually a reservation that the bank releases in five days.",
        "A refund for a returned {product} is booked when the warehouse has checked the serial number.",
    ),
    "shipping": (
        "When tracking of a {product} has not moved for three days, open a trace with the courier.",
        "Ask for a photo of the box before a crushed {product} is replaced.",
        "A {product} marked as delivered but not found is often with a neighbour.",
    ),
    "technical": (
        "Hold the power button of the {product} for ten seconds, then update the firmware.",
        "A {product} that gets hot should be unplugged and sent in for a check.",
        "If the {product} keeps disconnecting, move it closer and pair it again.",
    ),
    "account": (
        "Verify the e-mail address before a {product} is moved to another account.",
        "A locked login opens by itself after one hour; the {product} keeps working meanwhile.",
        "Reset links expire after thirty minutes, so ask the owner of the {product} to request a new one.",
    ),
    "sales": (
        "Orders of ten or more of the same {product} get a quote from the sales desk.",
        "Trade-in of an old {product} is possible if the screen and the case are whole.",
        "Tell the customer when the {product} is back in stock instead of offering another model.",
    ),
}
PRIORITY_RULES = (
    "A ticket is high priority when the customer says that it is urgent, needs an answer today or loses money.",
    "A ticket is low priority when the customer says that there is no rush.",
    "Without a word about time, a ticket has normal priority.",
    "Copy the order number as the letter A, a hyphen and five digits.",
)
