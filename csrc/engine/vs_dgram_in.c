/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_dgram_in - datagrams, and what became of sent ones, to the guest.
 *
 * A driver that knows VSO_F_DGRAM_INFO is told with each datagram what the host's kernel tells: TTL, TOS, the address it came to, and the
 * size of its parts where the kernel has joined several (UDP_GRO, only when the guest asked for that). Whether the application wants to
 * know is the driver's business, so nothing here depends on options that come and go.
 *
 * Errors.  Every datagram socket of the host has an error queue (IP_RECVERR), and each entry becomes an ERROR: errno, where the datagram
 * went, who said so. Entries about a socket without a peer are told too; the driver knows who wants them. What a call returned at once has
 * no entry and becomes an ERROR without origin. With the queue on, an error is told twice, once more by the next call on the socket: that
 * one only says that the queue should be read.
 *
 * What finds no room is dropped and counted, when the chain is too small for the datagram and its URI (a part of a datagram is worth
 * nothing, and the protocol cannot say that it is one). While the guest has no chain at all, datagrams wait in the host socket's own buffer.
 */
#include <errno.h>
#include <netinet/in.h>
#include <netinet/udp.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <linux/errqueue.h>

#include "vse_priv.h"

#define HEAD (sizeof(struct vso_hdr) + sizeof(struct vso_dgram))

enum { ERROR_BYTES = 1024 };	/* of the datagram that an error is about; with both URIs it fits every chain */

bool vse_is_six(const struct sockaddr_storage *ss)
{
	return ss->ss_family == AF_INET6 && !IN6_IS_ADDR_V4MAPPED(&((const struct sockaddr_in6 *)ss)->sin6_addr);
}

void vse_dgram_begin(struct vse_flow *f)
{
	static const struct { int level, name; } wants[] = {
		{ IPPROTO_IP, IP_RECVERR }, { IPPROTO_IP, IP_RECVTTL }, { IPPROTO_IP, IP_RECVTOS }, { IPPROTO_IP, IP_PKTINFO },
		{ IPPROTO_IPV6, IPV6_RECVERR }, { IPPROTO_IPV6, IPV6_RECVHOPLIMIT }, { IPPROTO_IPV6, IPV6_RECVTCLASS },
		{ IPPROTO_IPV6, IPV6_RECVPKTINFO },
	};

	if (!(f->pair->e->features & VSO_F_DGRAM_INFO))
		return;
	/* a socket without this level says so, and has nothing to tell */
	for (size_t i = 0; i < sizeof(wants) / sizeof(*wants); i++)
		setsockopt(f->fd, wants[i].level, wants[i].name, &(int){ 1 }, sizeof(int));
}

/* --------------------------------------------------------------------------------------------------------------- errors */

bool vse_local_known(const struct vse_flow *f, const struct in6_addr *local)
{
	for (int i = 0; i < VSE_LOCALS; i++)
		if (!memcmp(&f->locals[i], local, sizeof(*local)))
			return !IN6_IS_ADDR_UNSPECIFIED(local);
	return false;
}

static void local_seen(struct vse_flow *f, const struct in6_addr *local)
{
	if (!vse_local_known(f, local))
		f->locals[f->next_local++ % VSE_LOCALS] = *local;
}

void vse_dgram_failed(struct vse_flow *f, const char *uri, size_t uri_len, int error)
{
	struct vso_error err = { .error = (uint32_t)error, .uri_len = (uint16_t)uri_len };
	uint8_t buf[sizeof(err) + VSO_URI_MAX];
	struct vso_hdr h = vse_vso_hdr(f, VSO_ERROR, 0, (uint32_t)(sizeof(err) + uri_len));

	if (!(f->pair->e->features & VSO_F_DGRAM_INFO))
		return;
	memcpy(buf, &err, sizeof(err));
	if (uri_len)
		memcpy(buf + sizeof(err), uri, uri_len);
	vse_send(f->pair, &h, buf, h.len);
}

static const struct sock_extended_err *extended_err(struct msghdr *msg)
{
	for (struct cmsghdr *c = CMSG_FIRSTHDR(msg); c; c = CMSG_NXTHDR(msg, c))
		if ((c->cmsg_level == IPPROTO_IP && c->cmsg_type == IP_RECVERR) ||
		    (c->cmsg_level == IPPROTO_IPV6 && c->cmsg_type == IPV6_RECVERR))
			return c->cmsg_len >= CMSG_LEN(sizeof(struct sock_extended_err)) ? (const void *)CMSG_DATA(c) : NULL;
	return NULL;
}

/* one entry of the host's error queue. False: there was none, or the guest has no chain */
static bool tell_error(struct vse_flow *f)
{
	union {
		struct cmsghdr align;
		uint8_t bytes[512];
	} control;
	struct vse_engine *e = f->pair->e;
	struct sockaddr_storage ss = { 0 }, from = { 0 };
	struct iovec iov = { e->scratch, ERROR_BYTES };
	struct msghdr msg = {
		.msg_name = &ss, .msg_namelen = sizeof(ss), .msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control,
		.msg_controllen = sizeof(control),
	};
	char name[VSO_URI_MAX + 1] = "", offender[VSO_URI_MAX + 1] = "";
	const struct sock_extended_err *ee;
	struct vso_error err;
	struct vs_chain *c;
	struct vso_hdr h;
	const char *uri;
	size_t uri_len = 0, at = sizeof(h) + sizeof(err);
	ssize_t got;

	c = vse_rx_get(f->pair);
	if (!c)
		return false;
	got = recvmsg(f->fd, &msg, MSG_ERRQUEUE | MSG_DONTWAIT);
	ee = got < 0 ? NULL : extended_err(&msg);
	if (!ee) {
		vse_rx_unget(f->pair, c);
		f->errq &= got >= 0;
		return got >= 0;
	}
	if (ss.ss_family == AF_INET || ss.ss_family == AF_INET6)
		uri = vse_dgram_name(f, &ss, msg.msg_namelen, true, name, &uri_len);
	else
		uri = f->peer, uri_len = f->peer ? strlen(f->peer) : 0;
	memcpy(&from, SO_EE_OFFENDER(ee), sizeof(struct sockaddr_in6));
	if (ee->ee_origin == SO_EE_ORIGIN_ICMP || ee->ee_origin == SO_EE_ORIGIN_ICMP6) {
		if (from.ss_family == AF_INET || from.ss_family == AF_INET6)
			((struct sockaddr_in *)&from)->sin_port = 0;	/* the same place in sockaddr_in6; what is there means nothing */
		vse_uri_format(offender, f->ping ? "icmp" : "udp", &from);
	}
	err = (struct vso_error){
		.error = ee->ee_errno, .origin = ee->ee_origin, .icmp_type = ee->ee_type, .icmp_code = ee->ee_code, .info = ee->ee_info,
		.uri_len = (uint16_t)uri_len, .offender_len = (uint16_t)strlen(offender),
	};
	h = vse_vso_hdr(f, VSO_ERROR, 0, (uint32_t)(sizeof(err) + uri_len + err.offender_len + (size_t)got));
	vs_chain_write(c, sizeof(h), &err, sizeof(err));
	vs_chain_write(c, at, uri, uri_len);
	vs_chain_write(c, at + uri_len, offender, err.offender_len);
	vs_chain_write(c, at + uri_len + err.offender_len, e->scratch, (size_t)got);
	vse_rx_put(f->pair, c, &h, h.len);
	return true;
}

/* ------------------------------------------------------------------------------------------------------------ datagrams */

/* what the host's kernel tells about a datagram, in the driver's words */
static void read_info(struct vse_flow *f, struct msghdr *msg, struct vso_dgram *dg, struct in6_addr *local)
{
	int number;

	for (struct cmsghdr *c = CMSG_FIRSTHDR(msg); c; c = CMSG_NXTHDR(msg, c)) {
		if (c->cmsg_len >= CMSG_LEN(sizeof(number)))
			memcpy(&number, CMSG_DATA(c), sizeof(number));
		if ((c->cmsg_level == IPPROTO_IP && c->cmsg_type == IP_TTL) ||
		    (c->cmsg_level == IPPROTO_IPV6 && c->cmsg_type == IPV6_HOPLIMIT)) {
			dg->flags |= VSO_DG_TTL;
			dg->ttl = (uint8_t)number;
		} else if (c->cmsg_level == IPPROTO_IP && c->cmsg_type == IP_TOS) {
			dg->flags |= VSO_DG_TOS;
			dg->tos = *CMSG_DATA(c);	/* one byte, unlike all others */
		} else if (c->cmsg_level == IPPROTO_IPV6 && c->cmsg_type == IPV6_TCLASS) {
			dg->flags |= VSO_DG_TOS;
			dg->tos = (uint8_t)number;
		} else if (c->cmsg_level == IPPROTO_UDP && c->cmsg_type == UDP_GRO && number > 0 && number <= UINT16_MAX) {
			dg->flags |= VSO_DG_SEGMENT;
			dg->segment = (uint16_t)number;
		} else if (c->cmsg_level == IPPROTO_IP && c->cmsg_type == IP_PKTINFO) {
			dg->flags |= VSO_DG_LOCAL;
			*local = (struct in6_addr){ .s6_addr = { [10] = 0xff, [11] = 0xff } };
			memcpy(local->s6_addr + 12, &((const struct in_pktinfo *)CMSG_DATA(c))->ipi_addr, 4);
		} else if (c->cmsg_level == IPPROTO_IPV6 && c->cmsg_type == IPV6_PKTINFO) {
			dg->flags |= VSO_DG_LOCAL;
			*local = ((const struct in6_pktinfo *)CMSG_DATA(c))->ipi6_addr;
		}
	}
	if (dg->flags & VSO_DG_LOCAL)
		local_seen(f, local);
}

/* one datagram from the host into the chain. Return: bytes received, or -errno; *used: the chain was given to the guest */
static ssize_t receive(struct vse_flow *f, struct vs_chain *c, bool *used)
{
	union {
		struct cmsghdr align;
		uint8_t bytes[512];
	} control;
	struct vse_engine *e = f->pair->e;
	struct sockaddr_storage ss = { 0 };
	struct iovec iov = { e->scratch, VSE_SCRATCH };
	struct msghdr msg = {
		.msg_name = &ss, .msg_namelen = sizeof(ss), .msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control,
		.msg_controllen = sizeof(control),
	};
	struct vso_dgram dg = { 0 };
	struct in6_addr local;
	char buf[VSO_URI_MAX + 1];
	const char *uri;
	size_t uri_len, at;
	ssize_t got = recvmsg(f->fd, &msg, MSG_DONTWAIT);

	*used = false;
	if (got < 0)
		return -errno;
	if (e->features & VSO_F_DGRAM_INFO)
		read_info(f, &msg, &dg, &local);
	uri = vse_dgram_name(f, &ss, msg.msg_namelen, false, buf, &uri_len);
	at = HEAD + uri_len + (dg.flags & VSO_DG_LOCAL ? VSO_LOCAL_LEN : 0);
	if (uri && at + (size_t)got <= c->in_len && at - sizeof(struct vso_hdr) + (size_t)got <= e->max_payload) {
		struct vso_hdr h = vse_vso_hdr(f, VSO_DGRAM, 0, (uint32_t)(at - sizeof(h) + (size_t)got));

		dg.uri_len = (uint16_t)uri_len;
		vs_chain_write(c, sizeof(h), &dg, sizeof(dg));
		vs_chain_write(c, HEAD, uri, uri_len);
		if (dg.flags & VSO_DG_LOCAL)
			vs_chain_write(c, HEAD + uri_len, &local, sizeof(local));
		vs_chain_write(c, at, e->scratch, (size_t)got);
		vse_rx_put(f->pair, c, &h, h.len);
		f->to_guest += (uint64_t)got;
		e->stats.dgrams_to_guest++;
		*used = true;
	} else {
		e->stats.dgrams_dropped++;
	}
	return got;
}

enum vse_turn vse_dgram_turn(struct vse_flow *f)
{
	bool info = f->pair->e->features & VSO_F_DGRAM_INFO, used;
	int n = 0, errors = 0;

	f->errq |= f->hup;	/* EPOLLERR was seen */
	f->hup = false;
	while (f->readable) {
		struct vs_chain *c;
		ssize_t got;

		if (n++ == VSE_TURN_MSGS)
			return TURN_AGAIN;
		if (info && f->errq) {
			if (!tell_error(f) && f->errq)
				return TURN_STARVED;
			continue;
		}
		c = vse_rx_get(f->pair);
		if (!c)
			return TURN_STARVED;
		got = receive(f, c, &used);
		if (!used)
			vse_rx_unget(f->pair, c);
		/* errors report a datagram that was sent before (ICMP), one each; what was received is behind them */
		if (got == -EAGAIN || (got < 0 && ++errors == VSE_TURN_MSGS))
			f->readable = false;
		else if (got < 0)
			f->errq = true;
	}
	return TURN_DONE;
}
