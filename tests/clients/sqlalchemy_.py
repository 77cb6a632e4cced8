"""SQLAlchemy over psycopg: engine, ORM and pool. Reads PGHOST and its like."""

import sqlalchemy
from recipe import note, outlive, say, token
from sqlalchemy import create_engine, event, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "sqlalchemy_accounts"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    balance: Mapped[float | None]


# [recipe]
def engine():
    # libpq's PGHOST, PGUSER and PGDATABASE say where. In a URL the same is
    # postgresql+psycopg:///mydb?host=/run/credbroker/postgres&user=main_db
    made = create_engine("postgresql+psycopg://", pool_size=1, pool_pre_ping=True)

    @event.listens_for(made, "do_connect")
    def with_a_handle(_dialect, _record, _arguments, parameters):
        parameters["password"] = token()

    return made


# [end]


def use(made):
    Base.metadata.drop_all(made)
    Base.metadata.create_all(made)
    with Session(made) as session:
        session.add_all(Account(name=f"account {n}", balance=n / 2 if n % 3 else None) for n in range(1000))
        session.commit()
        rows = session.scalars(select(Account).where(Account.balance.is_(None)).order_by(Account.id)).all()
        say("orm", [row.name for row in rows[:3]] + [len(rows)])
        try:
            session.add(Account(name="account 1"))
            session.flush()
        except sqlalchemy.exc.IntegrityError as error:
            say("integrity", error.orig.sqlstate)
            session.rollback()
        with session.begin_nested() as savepoint:
            session.execute(text("DELETE FROM sqlalchemy_accounts"))
            savepoint.rollback()
        say("after savepoint", session.execute(text("SELECT count(*), sum(balance) FROM sqlalchemy_accounts")).one())
    say("inspected", sorted(column["name"] for column in sqlalchemy.inspect(made).get_columns("sqlalchemy_accounts")))
    with made.connect().execution_options(stream_results=True, yield_per=500) as connection:
        say("streamed", sum(n for (n,) in connection.execute(text("SELECT n FROM generate_series(1, 20000) AS n"))))
    with made.connect() as connection:
        try:
            connection.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
        except sqlalchemy.exc.OperationalError as error:
            say("ended by the server", (error.orig.sqlstate, error.connection_invalidated))
    Base.metadata.drop_all(made)


def pools(made):
    made.dispose()

    def query():
        with made.connect() as connection:
            return connection.execute(text("SELECT pg_backend_pid()")).scalar_one()

    outlive(query, sqlalchemy.exc.OperationalError)


note(f"version {sqlalchemy.__version__}")
ENGINE = engine()
use(ENGINE)
pools(ENGINE)
