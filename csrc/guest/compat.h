/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * compat.h - what differs between the kernels we build against, and nothing else.
 *
 * Kbuild looks into the headers and defines the VSO_HAVE_* names: distributions backport, so a version number would not tell.
 * Tested: Debian's 6.1, 6.12 and 7.3.
 */
#ifndef VSO_COMPAT_H
#define VSO_COMPAT_H

/* hex2bin(): 7.3 has it here alone, 6.1 in linux/kernel.h */
#if __has_include(<linux/hex.h>)
#include <linux/hex.h>
#endif
#include <linux/net.h>
#include <linux/version.h>
#include <net/inet_sock.h>
#include <net/sock.h>

/* connect and bind: struct sockaddr_unsized from 6.19 */
#ifdef VSO_HAVE_SOCKADDR_UNSIZED
typedef struct sockaddr_unsized vso_sockaddr;
#else
typedef struct sockaddr vso_sockaddr;
#endif

/* accept: struct proto_accept_arg from 6.10 */
#ifdef VSO_HAVE_PROTO_ACCEPT_ARG
#define VSO_ACCEPT_ARGS			struct proto_accept_arg *arg
#define VSO_ACCEPT_FLAGS		(arg->flags)
#define VSO_ACCEPT_PASS			arg
static inline int vso_accept_nonblock(const struct proto_ops *ops, struct socket *sock, struct socket *newsock,
				      struct proto_accept_arg *arg)
{
	struct proto_accept_arg nb = *arg;

	nb.flags |= O_NONBLOCK;
	return ops->accept(sock, newsock, &nb);
}
#else
#define VSO_ACCEPT_ARGS			int flags, bool kern
#define VSO_ACCEPT_FLAGS		(flags)
#define VSO_ACCEPT_PASS			flags, kern
static inline int vso_accept_nonblock(const struct proto_ops *ops, struct socket *sock, struct socket *newsock,
				      int flags, bool kern)
{
	return ops->accept(sock, newsock, flags | O_NONBLOCK, kern);
}
#endif

/* virtio_find_vqs: struct virtqueue_info from 6.11 */
#ifdef VSO_HAVE_VIRTQUEUE_INFO
#define VSO_VQ_ARRAYS(n)		struct virtqueue_info info[n] = {}
#define VSO_VQ_SET(i, cb, nm)		(info[i] = (struct virtqueue_info){ .callback = (cb), .name = (nm) })
#define VSO_FIND_VQS(vdev, n, vqs)	virtio_find_vqs(vdev, n, vqs, info, NULL)
#else
#define VSO_VQ_ARRAYS(n)		vq_callback_t *vq_cbs[n]; const char *vq_names[n]
#define VSO_VQ_SET(i, cb, nm)		(vq_cbs[i] = (cb), vq_names[i] = (nm))
#define VSO_FIND_VQS(vdev, n, vqs)	virtio_find_vqs(vdev, n, vqs, vq_cbs, vq_names, NULL)
#endif

/* the flags of struct inet_sock became atomic bits in 6.6 */
#ifdef VSO_HAVE_INET_FLAGS
#define vso_inet_transparent(sk)	inet_test_bit(TRANSPARENT, sk)
#define vso_inet_freebind(sk)		inet_test_bit(FREEBIND, sk)
#define vso_inet_bind_no_port(sk)	inet_test_bit(BIND_ADDRESS_NO_PORT, sk)
#define vso_inet_recverr(sk)		inet_test_bit(RECVERR, sk)
#define vso_inet6_recverr(sk)		inet6_test_bit(RECVERR6, sk)
#define vso_inet_cmsg_flags(sk)		inet_cmsg_flags(inet_sk(sk))
#else
#define vso_inet_transparent(sk)	(inet_sk(sk)->transparent)
#define vso_inet_freebind(sk)		(inet_sk(sk)->freebind)
#define vso_inet_bind_no_port(sk)	(inet_sk(sk)->bind_address_no_port)
#define vso_inet_recverr(sk)		(inet_sk(sk)->recverr)
#define vso_inet6_recverr(sk)		(inet6_sk(sk)->recverr)
#define vso_inet_cmsg_flags(sk)		(inet_sk(sk)->cmsg_flags)
#endif

/* the notification of a zero-copy send: one argument more from 6.17 */
#ifdef VSO_HAVE_ZEROCOPY_DEVMEM
#define vso_msg_zerocopy(sk, len)	msg_zerocopy_realloc(sk, len, NULL, false)
#else
#define vso_msg_zerocopy(sk, len)	msg_zerocopy_realloc(sk, len, NULL)
#endif

/* the bytes lie in pages that a socket may refer to: from 6.5. Before, sendpage() is called for each */
#ifdef MSG_SPLICE_PAGES
#define VSO_SPLICE_PAGES		MSG_SPLICE_PAGES
#else
#define VSO_SPLICE_PAGES		0
#endif

/* SOL_SOCKET options come to the socket's table, too, from 6.8 on. Before, the core sets them on the carrier and we do not hear of it. */
static inline void vso_custom_sockopt(struct socket *sock, bool on)
{
#ifdef SOCK_CUSTOM_SOCKOPT
	if (on)
		set_bit(SOCK_CUSTOM_SOCKOPT, &sock->flags);
	else
		clear_bit(SOCK_CUSTOM_SOCKOPT, &sock->flags);
#endif
}

/*
 * Filters would be set on the carrier, where nothing passes them. Where we are not asked, the socket's own lock (SO_LOCK_FILTER) refuses them,
 * with EPERM. The bit is set without the sock's lock: an option that is set at this moment may lose it for us, we lose nothing of others.
 * Return: it was not locked before.
 */
static inline bool vso_filter_lock(struct sock *sk)
{
#ifndef SOCK_CUSTOM_SOCKOPT
	return !test_and_set_bit(SOCK_FILTER_LOCKED, &sk->sk_flags);
#else
	return false;
#endif
}

static inline void vso_filter_unlock(struct sock *sk)
{
	clear_bit(SOCK_FILTER_LOCKED, &sk->sk_flags);
}

#endif
