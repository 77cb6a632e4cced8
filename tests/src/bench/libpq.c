/* What libpq's users wait for, timed: connecting up to the first row, and COPY … TO STDOUT.
 * Where to connect is in libpq's environment variables.
 *
 *   libpq-client connect COUNT PAUSE_US   prints the nanoseconds of each connect
 *   libpq-client copy SQL                 prints the bytes and the nanoseconds
 */
#include <libpq-fe.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static long long now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static PGconn *connected(void)
{
	PGconn *connection = PQconnectdb("");

	if (PQstatus(connection) != CONNECTION_OK) {
		fputs(PQerrorMessage(connection), stderr);
		exit(1);
	}
	return connection;
}

static void expect(PGconn *connection, PGresult *result, ExecStatusType status)
{
	if (PQresultStatus(result) != status) {
		fputs(PQerrorMessage(connection), stderr);
		exit(1);
	}
	PQclear(result);
}

static void connect_and_finish(long count, long pause)
{
	for (long n = 0; n < count; n++) {
		if (pause)
			usleep((useconds_t)pause);
		long long started = now();
		PGconn *connection = connected();
		expect(connection, PQexec(connection, "SELECT 1"), PGRES_TUPLES_OK);
		long long row = now();
		PQfinish(connection);
		printf("%lld\n", row - started);
	}
}

static void copy(const char *sql)
{
	PGconn *connection = connected();
	long long started = now(), bytes = 0;
	char *row;
	int length;

	expect(connection, PQexec(connection, sql), PGRES_COPY_OUT);
	while ((length = PQgetCopyData(connection, &row, 0)) > 0) {
		bytes += length;
		PQfreemem(row);
	}
	expect(connection, PQgetResult(connection), PGRES_COMMAND_OK);
	printf("%lld %lld\n", bytes, now() - started);
	PQfinish(connection);
}

int main(int count, char **arguments)
{
	if (count == 4 && strcmp(arguments[1], "connect") == 0)
		connect_and_finish(atol(arguments[2]), atol(arguments[3]));
	else if (count == 3 && strcmp(arguments[1], "copy") == 0)
		copy(arguments[2]);
	else
		return 64;
	return 0;
}
