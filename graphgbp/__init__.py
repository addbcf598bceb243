from graphgbp.convert import vjp
