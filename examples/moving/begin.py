"""`plain.py` after the first step: two lines for the class, one import, one setting."""

import os

import click
from flask import Flask, abort, current_app, request
from flask.cli import with_appcontext
from flask_login import LoginManager, UserMixin, current_user, login_required, login_user
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import event

from fictive.flask_sqlalchemy import OptInTransactionMixin


class DB(OptInTransactionMixin, SQLAlchemy):
    pass


db = DB()
login_manager = LoginManager()


class User(UserMixin, db.Model):
    __tablename__ = "reader"
    id = db.Column(db.Integer, primary_key=True)
    name = db.Column(db.String, unique=True, nullable=False)
    logins = db.Column(db.Integer, default=0, nullable=False)


class Token(db.Model):
    id = db.Column(db.Integer, primary_key=True)
    user_id = db.Column(db.ForeignKey("reader.id"), nullable=False)
    value = db.Column(db.String, nullable=False)


class Book(db.Model):
    id = db.Column(db.Integer, primary_key=True)
    title = db.Column(db.String, nullable=False)
    copies = db.Column(db.Integer, nullable=False)


class Loan(db.Model):
    id = db.Column(db.Integer, primary_key=True)
    book_id = db.Column(db.ForeignKey("book.id"), nullable=False)
    user_id = db.Column(db.ForeignKey("reader.id"), nullable=False)


class Mail(db.Model):
    id = db.Column(db.Integer, primary_key=True)
    loan_id = db.Column(db.Integer, nullable=False)
    sent = db.Column(db.Boolean, default=False, nullable=False)


def create_app(url=None, check_password=None, send=print):
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = url or os.environ["DATABASE_URL"]
    app.config["FICTIVE_WRITES_OUTSIDE"] = "begin"
    app.config["SECRET_KEY"] = "only for this example"
    app.extensions["library"] = {"check_password": check_password, "send": send, "titles": {}}
    db.init_app(app)
    login_manager.init_app(app)
    app.cli.add_command(send_mails)
    with app.app_context():
        event.listen(db.session, "after_commit", forget_titles)

    @app.post("/login")
    def login():
        user = User.query.filter_by(name=request.json["name"]).first_or_404()
        if not app.extensions["library"]["check_password"](user.name, request.json["password"]):  # another service
            abort(401)
        user.logins += 1
        db.session.commit()
        login_user(user)
        return {"logins": user.logins}

    @app.post("/token")
    @login_required
    def replace_token():
        Token.query.filter_by(user_id=current_user.id).delete()
        db.session.add(Token(user_id=current_user.id, value=request.json["value"]))
        db.session.commit()
        return "", 204

    @app.get("/books")
    @login_required
    def books():
        titles = app.extensions["library"]["titles"]  # a cache
        if not titles:
            titles.update((book.title, book.copies) for book in Book.query.order_by(Book.title))
        return titles

    @app.post("/books/<int:id>/loans")
    @login_required
    def lend(id):
        book = db.get_or_404(Book, id)
        if book.copies == 0:
            abort(409, "all copies are lent")
        try:
            book.copies -= 1
            loan = Loan(book_id=book.id, user_id=current_user.id)
            db.session.add(loan)
            db.session.flush()  # for its id
            db.session.add(Mail(loan_id=loan.id))
            db.session.commit()
        except Exception:
            db.session.rollback()
            raise
        return {"left": book.copies}

    return app


@login_manager.user_loader
def load_user(id):
    return db.session.get(User, int(id))


def forget_titles(session):
    current_app.extensions["library"]["titles"].clear()


@click.command()
@with_appcontext
def send_mails():
    """Send what is waiting, as one worker."""
    for mail in Mail.query.filter_by(sent=False).order_by(Mail.id).limit(100):
        current_app.extensions["library"]["send"](f"loan {mail.loan_id}")
        mail.sent = True
    db.session.commit()
